"""Preparation of training records from raw videos: `python -m fantasy_jax.prepare`.

`scan` finds videos and `captions` their prompts, `cutting` splits a video into segments, and `analysis`,
`measures` and `filters` examine each clip and drop bad ones: clips of one person who speaks (`talking`) or of
people who act (`portrait`). `stages` combines them: the clips of a video are a function of the file
and the settings only. `store` runs it in parallel processes and keeps each video's result, `encode` runs the
clips through the networks into `shards` and assembles the dataset, `report` shows what was dropped and why.
`beam` runs the same stages under Apache Beam.
"""
