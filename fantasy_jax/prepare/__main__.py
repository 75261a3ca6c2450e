"""Runs `python -m fantasy_jax.prepare`."""

if __name__ == "__main__":  # worker processes import this file, too, and do not need the networks
    from fantasy_jax import cli

    cli.exit_on_interrupt("fantasy_jax.prepare")
    from fantasy_jax.prepare.command import main

    cli.run(main, "fantasy_jax.prepare")
