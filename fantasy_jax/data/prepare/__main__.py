"""`python -m fantasy_jax.data.prepare`."""

if __name__ == "__main__":  # the pool's processes import this file, too, and need no networks
    from fantasy_jax import cli
    from fantasy_jax.data.prepare.command import main

    cli.run(main, "fantasy_jax.data.prepare")
