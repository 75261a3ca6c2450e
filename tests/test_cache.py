"""The folder of compiled programs: where it is, and that an unusable one does not end a run."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from fantasy_jax.performance.cache import keep_compiled_programs

OPTIONS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def settings():
    """JAX with its cache turned on and no folder; the settings of the tests are restored."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    for name, value in zip(OPTIONS, (True, None, 0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_program():
    return jax.jit(lambda x: x + 1)(jnp.zeros(3))


def test_programs_are_kept_in_the_users_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled_programs()
    (folder,) = (tmp_path / "fantasy_jax" / "xla").iterdir()
    assert capsys.readouterr().out.startswith(f"Compiled programs are kept in {folder} ")
    compile_program()
    assert any(folder.iterdir())


def test_the_environment_turns_it_off(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", False)
    keep_compiled_programs()
    compile_program()
    assert not any(tmp_path.iterdir())
    assert not capsys.readouterr().out


def test_an_unusable_folder_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled_programs()
    assert capsys.readouterr().err.startswith("Compiled programs are not kept (")
    assert jax.config.jax_compilation_cache_dir is None
    # The folder that the environment names is JAX's own affair, which warns.
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file" / "cache"))
    keep_compiled_programs()
    with pytest.warns(UserWarning, match="persistent compilation cache"):
        compile_program()
