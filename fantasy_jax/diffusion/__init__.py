"""Flow matching: schedule, guidance, sampler, losses."""
