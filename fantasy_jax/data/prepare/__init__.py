"""From raw video to records that are trained on: `python -m fantasy_jax.data.prepare`.

`scan` finds files and captions, `cutting` makes clips of a video, `filters` measure them. `stages` put these
together: one video to its clips, a function of the file and the settings alone. `store` runs that in
processes and keeps each video's result, `encode` takes the clips through the networks into the dataset,
`report` says what was dropped and why. `beam` runs the same stages under Apache Beam.
"""
