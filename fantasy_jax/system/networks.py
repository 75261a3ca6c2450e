"""The networks of a system as one mapping, whatever their weights come from."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from fantasy_jax.errors import ConfigError
from fantasy_jax.models.eight_bit import EightBit, linear_layers, multiply_in_eight_bits
from fantasy_jax.models.layers import in_host
from fantasy_jax.preprocessing.text import Tokenizer
from fantasy_jax.sharding import MeshConfig, WeightsMemory, in_host_memory, make_mesh, shard_module
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.registry import Component, component_of

Keep = Literal["all", "transformer", "none"]
"""Networks that stay in memory after their use."""


EIGHT_BIT_LAYERS = r"^(transformer|text_encoder|image_encoder)/(blocks|layers)/"
"""Linear layers that have 8-bit weights, by slot and path: those of the blocks of the three largest networks.

All blocks alike, since the blocks of a stack are one array. To leave out the first two and the last three, as
is published for products in 8 bits (arXiv 2606.00957), would take three stacks in place of one, and weights
alone do not need it."""

MLPS = r"^blocks/mlp_(in|out)$"
"""The transformer's layers whose products may have 8 bits. With all linear layers in float8, Wan2.2 gave
noise; with the MLPs alone, a stable result (vllm-project/vllm-omni, issue 2920)."""


@runtime_checkable
class Loader(Protocol):
    """Makes one network: with random, stored or trained weights."""

    def __call__(self, component: Component, config: Any, dtype: jnp.dtype, mesh: Mesh | None) -> nnx.Module:
        """Makes a network.

        Args:
            component: Its row.
            config: Its sizes.
            dtype: Type of weights and matrix products.
            mesh: Mesh that its parameters are sharded over; None: one device.
        """
        ...


# Not `Mapping[str, nnx.Module]`, whose items run-time type checkers would load to check their type.
class Networks(Mapping):
    """Networks by slot, each made when it is asked for; `networks["transformer"]` has its adapters.

    Attributes:
        config: All sizes.
    """

    def __init__(
        self,
        config: ModelConfig,
        loader: Loader,
        tokenizer: Callable[[], Tokenizer],
        *,
        given: Mapping[str, nnx.Module] | None = None,
        mesh: Mesh | None = None,
        mesh_config: MeshConfig | None = None,
        keep: Keep = "none",
        kept: dict[str, nnx.Module] | None = None,
        dtypes: Mapping[str, str] | None = None,
    ):
        """Keeps what is needed to make each network.

        Args:
            config: All sizes.
            loader: Makes a network.
            tokenizer: Makes the text encoder's tokenizer.
            given: Networks that are in memory already, by slot.
            mesh: Mesh that parameters are sharded over.
            mesh_config: Its settings.
            keep: Networks that stay in memory once they are made.
            kept: Those that were made before.
            dtypes: Types of weights and products that differ from those of `config`, by slot.
        """
        self.config = config
        self._loader, self._tokenizer = loader, tokenizer
        self._given = dict(given or {})
        self._mesh, self._mesh_config, self._keep = mesh, mesh_config, keep
        self._kept = {} if kept is None else kept
        self._dtypes = dict(dtypes or {})

    def __getitem__(self, slot: str) -> nnx.Module:
        """The network in a slot; KeyError if the system has none."""
        if slot in self._given:
            return self._given[slot]
        if slot not in self._kept:
            network = self._make(slot)
            if self._keep != "all" and slot != self._keep:
                return network
            self._kept[slot] = network
        return self._kept[slot]

    def __contains__(self, slot: object) -> bool:
        """Whether the system has a network in a slot; nothing is made."""
        return slot in self.config.networks

    def __iter__(self) -> Iterator[str]:
        """The slots."""
        return iter(self.config.networks)

    def __len__(self) -> int:
        """Number of networks."""
        return len(self.config.networks)

    @property
    def tokenizer(self) -> Tokenizer:
        """The text encoder's tokenizer."""
        return self._tokenizer()

    def replace(self, **given: nnx.Module) -> "Networks":
        """A copy in which some networks are given, by slot, such as ones that were trained."""
        changes = {"given": self._given | given}
        if given.keys() & {row.slot for row in self.config.adapters.values()}:
            changes["kept"] = {}  # a transformer that was kept has the previous adapters
        return self._copy(**changes)

    def keeping(self, keep: Keep) -> "Networks":
        """A copy whose networks stay in memory once they are made: all, the transformer alone, or none."""
        return self._copy(keep=keep)

    def with_dtypes(self, **dtypes: str | None) -> "Networks":
        """A copy in which networks that are yet to be made have other types, by slot; None: as they were."""
        changed = {slot: dtype for slot, dtype in dtypes.items() if dtype is not None}
        kept = {slot: network for slot, network in self._kept.items() if slot not in changed}
        return self._copy(dtypes=self._dtypes | changed, kept=kept) if changed else self

    def for_stage(self) -> "Networks":
        """A copy that keeps every network for as long as it lives itself, for a stage of several clips."""
        return self._copy(keep="all", kept=dict(self._kept))

    @contextmanager
    def on_mesh(self, mesh_config: MeshConfig, mesh: Mesh | None = None) -> Iterator["Networks"]:
        """Sets the mesh, and yields the networks sharded over it; on one device, the networks as they are.

        Args:
            mesh_config: Sizes of the mesh.
            mesh: The mesh of these sizes, if it has been made before.
        """
        mesh = mesh or make_mesh(**mesh_config.axes)
        if mesh.size == 1:
            yield self
            return
        with jax.set_mesh(mesh):
            yield self if self._mesh is mesh else self._copy(mesh=mesh, mesh_config=mesh_config, kept={})

    def _copy(self, **changes: Any) -> "Networks":
        settings = {
            "given": self._given,
            "mesh": self._mesh,
            "mesh_config": self._mesh_config,
            "keep": self._keep,
            "kept": self._kept,
            "dtypes": self._dtypes,
        }
        return Networks(self.config, self._loader, self._tokenizer, **(settings | changes))

    def _make(self, slot: str) -> nnx.Module:
        config = self.config.networks[slot]
        component = component_of(config)
        dtype = self._dtypes.get(slot) or component.dtype or self.config.dtype
        network = self._loader(component, config, jnp.dtype(dtype), self._mesh)
        if slot == "transformer":
            for name, adapter in self.config.adapters.items():
                network.adapters[name] = self[adapter.slot]
            if self._mesh_config is not None:
                network.context_parallelism = self._mesh_config.context_parallelism
        return network


def random_networks(config: ModelConfig, tokenizer: Tokenizer, *, seed: int = 0) -> Networks:
    """Networks with random weights: the whole path runs, and its output is noise.

    Args:
        config: All sizes.
        tokenizer: The text encoder's.
        seed: Seed of the weights.

    Raises:
        ConfigError: The tokenizer has more tokens than the text encoder.
    """
    check_vocabulary(config, tokenizer)
    return Networks(config, RandomLoader(seed), lambda: tokenizer)


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises a ConfigError if a tokenizer has more tokens than the text encoder."""
    if config.text_encoder is not None and len(tokenizer) > config.text_encoder.vocab_size:
        raise ConfigError(
            f"model.text_encoder.vocab_size ({config.text_encoder.vocab_size}) must be at least the "
            f"tokenizer's {len(tokenizer)} tokens; set --config.model.text_encoder.vocab_size"
        )


class RandomLoader:
    """Draws initial weights (a `Loader`)."""

    def __init__(self, seed: int = 0):
        """Keeps the seed."""
        self.seed = seed

    def __call__(self, component: Component, config: Any, dtype: jnp.dtype, mesh: Mesh | None) -> nnx.Module:
        """Draws one network; on a mesh in host memory first, so that no device holds all of it."""
        if mesh is None:
            return component.init(config, dtype, seed=self.seed)
        with in_host_memory():
            return shard_module(component.init(config, dtype, seed=self.seed), mesh)


def abstract_networks(
    config: ModelConfig,
    mesh: Mesh,
    mesh_config: MeshConfig,
    *,
    eight_bit: EightBit | None = None,
    weights_memory: WeightsMemory = "device",
    eight_bit_products: bool = False,
) -> Networks:
    """Networks of `jax.ShapeDtypeStruct`s with shardings: their programs can be compiled but not run.

    Args:
        config: All sizes.
        mesh: The current mesh.
        mesh_config: Its settings.
        eight_bit: Type of the weights that `convert_weights.py quantize` would give 8 bits; None: none.
        weights_memory: As for `weights.loading.stored_networks`.
        eight_bit_products: Likewise.

    Raises:
        ConfigError: Weights of several devices are to lie in the memory of the host, or no weights of MLPs
            have 8 bits for products in 8 bits.
    """
    check_memory(weights_memory, mesh)

    def load(component: Component, sizes: Any, dtype: jnp.dtype, mesh: Mesh | None) -> nnx.Module:
        network = component.abstract(sizes, dtype)
        if eight_bit is not None:
            layers = linear_layers(network, EIGHT_BIT_LAYERS, eight_bit, prefix=f"{component.slot}/")
            network = component.abstract(sizes, dtype, layers)
        if eight_bit_products and component.slot == "transformer":
            multiply_in_eight_bits(network, MLPS)
        network = shard_module(network, mesh)
        return in_host(network) if weights_memory == "host" and is_streamed(component) else network

    def no_tokenizer() -> Tokenizer:
        raise NotImplementedError("abstract networks have no tokenizer")

    return Networks(config, load, no_tokenizer, mesh=mesh, mesh_config=mesh_config)


def is_streamed(component: Component) -> bool:
    """Whether the blocks of a network are copied to the device one by one if `weights_memory` is `host`."""
    return component.slot == "transformer" or component.adapter is not None


def check_memory(weights_memory: WeightsMemory, mesh: Mesh | None) -> None:
    """Raises a ConfigError if weights of several devices are to lie in the memory of the host."""
    if weights_memory == "host" and mesh is not None and mesh.size > 1:
        raise ConfigError(
            f"sample.weights_memory is 'host', which is for one device; on a mesh of {mesh.size} the weights "
            "are sharded along fsdp and tensor"
        )
