"""LoRA files of other programs for Wan2.1's transformer, in any of the spellings in use.

    kohya      lora_unet_blocks_0_self_attn_q.lora_down.weight, .lora_up.weight, .alpha
    ComfyUI    diffusion_model.blocks.0.self_attn.q.lora_A.weight, .lora_B.weight, or lora_down, lora_up
    lightx2v   the same, and differences: .diff of a weight, .diff_b of a bias, .diff_m of a modulation
    peft       base_model.model.blocks.0.self_attn.q.lora_A.default.weight, .lora_B.default.weight
    diffusers  transformer.blocks.0.attn1.to_q.lora_A.weight, .lora_B.weight

The names between prefix and suffix are those of the transformer's own files, so that the key tables of
`convert.wan` map them too; in kohya's, dots are underscores. Every layer can have a rank of its own.

Sources: diffusers, `loaders/lora_conversion_utils.py`; LightX2V, `utils/lora_loader.py` and
`tools/extract/lora_extractor.py`; kohya-ss/musubi-tuner, `networks/lora_wan.py`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from fantasy_jax.convert.files import WeightsFile
from fantasy_jax.convert.rules import (
    LINEAR,
    Entry,
    Parameter,
    Plan,
    Problem,
    TensorSpec,
    make_plan,
)
from fantasy_jax.convert.wan import diffusers_rules, official_rules
from fantasy_jax.errors import WeightsError
from fantasy_jax.files import parse_json
from fantasy_jax.models.wan import WanConfig
from fantasy_jax.typing import Float

Role = Literal["down", "up", "alpha", "difference"]
Spelling = Literal["kohya", "comfyui", "lightx2v", "peft", "diffusers"]

_KOHYA = "lora_unet_"
_KEY = re.compile(
    rf"(?P<prefix>{_KOHYA}|(?:(?:base_model|model|diffusion_model|transformer|unet)\.)*)(?P<stem>.+?)\."
    r"(?:lora_(?P<matrix>A|B|down|up)(?P<adapter>\.\w+)?\.weight|(?P<other>alpha|diff|diff_b|diff_m))"
)
_ROLES: dict[str, Role] = {"A": "down", "down": "down", "B": "up", "up": "up", "alpha": "alpha"}
_TENSORS = {"diff_b": ".bias", "diff_m": ".modulation"}
"""The tensor that a difference belongs to; all else belongs to `.weight`."""
_MODULATIONS = ("modulation", "scale_shift_table")
"""Tensors whose `.diff` is their own, in files that were renamed for ComfyUI."""
_MODELS = {1536: "Wan2.1 1.3B", 3072: "Wan2.2 5B", 5120: "Wan2.1 14B"}


@dataclass(frozen=True)
class Change:
    """What a file adds to one tensor of the transformer, as keys of the file; a role it lacks is empty.

    Attributes:
        down: A, `[rank, inputs]`.
        up: B, `[outputs, rank]`.
        alpha: Number; the product of B and A is multiplied by alpha / rank.
        difference: Added as it is.
    """

    down: str = ""
    up: str = ""
    alpha: str = ""
    difference: str = ""

    @property
    def keys(self) -> list[str]:
        """All keys."""
        return [key for key in (self.down, self.up, self.alpha, self.difference) if key]


@dataclass(frozen=True, eq=False)
class LoRATensors:
    """The content of a LoRA file, and its places in a transformer.

    Attributes:
        weights: The file.
        spelling: That of its keys.
        plan: One entry for each tensor of the file that has a place, and all problems.
        changes: What is added to each parameter, or to a layer of a stacked one. Each entry's transform
            brings it from PyTorch's layout to ours.
    """

    weights: WeightsFile
    spelling: Spelling
    plan: Plan
    changes: Sequence[tuple[Entry, Change]]

    @property
    def ranks(self) -> Counter[int]:
        """How many products have each rank."""
        return Counter(self.weights.specs[change.down].shape[0] for _, change in self.changes if change.down)

    @property
    def width(self) -> int | None:
        """Width of the transformer that it is for; None where it does not change attention."""
        specs = self.weights.specs
        ups = [change.up for entry, change in self.changes if change.up and "attention" in entry.path]
        widths = Counter(specs[up].shape[0] for up in ups)
        return widths.most_common(1)[0][0] if widths else None

    @property
    def model(self) -> str:
        """Name of the published model of this width, in brackets; empty if there is none."""
        return f" ({_MODELS[self.width]})" if self.width in _MODELS else ""

    def product(
        self, entry: Entry, change: Change
    ) -> tuple[Float[np.ndarray, "I R"], Float[np.ndarray, "R O"]] | None:
        """A and B in our layout, float32, B multiplied by alpha / rank; None where there is no product.

        A product that is no matrix in our layout is part of `difference`.
        """
        if not change.down or entry.transform is not LINEAR:
            return None
        down, up = self._matrices(change)
        return down.reshape(len(down), -1).T, up.reshape(len(up), -1).T

    def difference(self, entry: Entry, change: Change) -> np.ndarray | None:
        """What is added to the parameter beside `product`, float32 in our layout; None if it is nothing."""
        parts = [_read(self.weights, change.difference)] if change.difference else []
        if change.down and entry.transform is not LINEAR:
            down, up = self._matrices(change)
            flat = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
            parts.append(flat.reshape(len(up), *down.shape[1:]))
        if not parts:
            return None
        needed = entry.transform.inverse(np.broadcast_to(np.int8(0), self._shape(entry))).shape
        return entry.transform.forward(sum(_padded(part, needed) for part in parts))

    @cached_property
    def _settings(self) -> Mapping[str, Any]:
        return _adapter_settings(self.weights.path)

    def _shape(self, entry: Entry) -> tuple[int, ...]:
        shape = self.plan.target[entry.path].shape
        return shape if entry.layer is None else shape[1:]

    def _matrices(self, change: Change) -> tuple[np.ndarray, np.ndarray]:
        down, up = (_read(self.weights, key) for key in (change.down, change.up))
        return down, up * np.float32(self._scale(change, len(down)))

    def _scale(self, change: Change, rank: int) -> float:
        path, settings = self.weights.path, {} if change.alpha else self._settings
        if settings.get("alpha_pattern"):
            raise WeightsError(f"{path}: has an alpha_pattern of peft, which is not supported")
        alpha = settings.get("lora_alpha", rank)
        if change.alpha:
            alpha = _read(self.weights, change.alpha).item()
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise WeightsError(f"{path}: alpha is {alpha!r}, not a number")
        return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def is_lora(weights: WeightsFile) -> bool:
    """Whether a file holds a LoRA: its keys end as those of one."""
    return any(
        (match := _KEY.fullmatch(key)) and (match["matrix"] or match["other"] != "alpha")
        for key in weights.specs
    )


def read_lora(weights: WeightsFile, config: WanConfig, target: Mapping[str, Parameter]) -> LoRATensors:
    """Finds the places of a LoRA's tensors in a transformer; reads no values.

    Args:
        weights: The file.
        config: Sizes of the transformer.
        target: Its parameters by path.
    """
    changes, spelling, problems = _changes(weights.specs)
    specs = {name: _spec(change, weights.specs, config) for name, change in changes.items()}
    tables = {"official": official_rules(config), "diffusers": diffusers_rules(config)}
    if spelling == "kohya":
        tables = {name: [replace(x, source=_underscored(x.source)) for x in t] for name, t in tables.items()}
    plans = {name: make_plan(rules, specs, target) for name, rules in tables.items()}
    best = min(plans, key=lambda name: sum(x.kind == "unexpected" for x in plans[name].problems))
    if best == "diffusers" and spelling != "kohya":
        spelling = "diffusers"
    # A LoRA need not change every parameter.
    problems += [problem for problem in plans[best].problems if problem.kind != "missing"]
    placed = [(entry, changes[entry.key]) for entry in plans[best].entries]
    entries = [replace(entry, key=key) for entry, change in placed for key in change.keys]
    return LoRATensors(weights, spelling, Plan(entries, dict(target), {}, problems), placed)


def check_lora(lora: LoRATensors, config: WanConfig) -> LoRATensors:
    """Returns a LoRA that fits the transformer of these sizes.

    Raises:
        WeightsError: It is for another transformer, or tensors of the file have no place in it.
    """
    path, problems = lora.weights.path, lora.plan.problems
    if not is_lora(lora.weights):
        raise WeightsError(f"{path}: is no LoRA")
    if not problems:
        return lora
    if lora.width not in (None, config.dim):
        raise WeightsError(
            f"{path}: is a LoRA for a transformer of width {lora.width}{lora.model}; this one has width "
            f"{config.dim}"
        )
    more = f"; and {len(problems) - 3} more" * (len(problems) > 3)
    listed = "; ".join(problem.detail for problem in problems[:3])
    raise WeightsError(f"{path}: does not fit this transformer of {config.num_layers} blocks: {listed}{more}")


def _changes(specs: Mapping[str, TensorSpec]) -> tuple[dict[str, Change], Spelling, list[Problem]]:
    """The tensors of a file by the tensor of the transformer that they change, without the prefix."""
    grouped: dict[str, dict[Role, str]] = {}
    problems: list[Problem] = []
    matches = {key: _KEY.fullmatch(key) for key in specs}
    for key, match in matches.items():
        if match is None:
            problems.append(Problem("unexpected", key, "", f"{key} is of no known kind"))
            continue
        is_own = match["other"] == "diff" and match["stem"].endswith(_MODULATIONS)
        name = match["stem"] + ("" if is_own else _TENSORS.get(match["other"], ".weight"))
        role = _ROLES.get(match["matrix"] or match["other"], "difference")
        if other := grouped.setdefault(name, {}).get(role):
            problems.append(Problem("ambiguous", key, "", f"{key} and {other} are for the same layer"))
        grouped[name][role] = key
    changes = {name: Change(**roles) for name, roles in grouped.items()}
    faults = {name: fault for name, change in changes.items() if (fault := _fault(change, specs))}
    problems += [Problem("wrong shape", changes[name].keys[0], "", fault) for name, fault in faults.items()]
    found = [match for match in matches.values() if match is not None]
    return {k: x for k, x in changes.items() if k not in faults}, _spelling(found), problems


def _fault(change: Change, specs: Mapping[str, TensorSpec]) -> str:
    """Why the tensors of one layer do not belong together; empty if they do."""
    if bool(change.down) != bool(change.up) or (change.alpha and not change.down):
        return f"{change.keys[0]} has no matching lora_A and lora_B"
    if not change.down:
        return ""
    down, up = specs[change.down].shape, specs[change.up].shape
    if min(len(down), len(up)) < 2 or down[0] != up[1] or not down[0]:
        return f"{change.down} {list(down)} and {change.up} {list(up)} cannot be multiplied"
    if change.alpha and math.prod(specs[change.alpha].shape) != 1:
        return f"{change.alpha} {list(specs[change.alpha].shape)} is not a number"
    product = (up[0], *down[1:])
    if change.difference and specs[change.difference].shape != product:
        return f"{change.difference} {list(specs[change.difference].shape)} must be {list(product)}"
    return ""


def _spelling(matches: Sequence[re.Match[str]]) -> Spelling:
    """The spelling by prefix and suffix; that of diffusers is in the names between them."""
    if any(match["prefix"] == _KOHYA for match in matches):
        return "kohya"
    if any(match["prefix"].startswith("base_model.") or match["adapter"] for match in matches):
        return "peft"
    if any((match["other"] or "").startswith("diff") for match in matches):
        return "lightx2v"
    return "comfyui"


def _spec(change: Change, specs: Mapping[str, TensorSpec], config: WanConfig) -> TensorSpec:
    """Shape of what is added, as the tensor of the transformer that it is added to should have it."""
    if not change.down:
        spec = specs[change.difference]
    else:
        spec = TensorSpec((specs[change.up].shape[0], *specs[change.down].shape[1:]), specs[change.up].dtype)
    if len(spec.shape) == 5 and spec.shape[1] == config.latent_channels:
        channels = config.latent_channels + config.condition_channels
        return TensorSpec((spec.shape[0], channels, *spec.shape[2:]), spec.dtype)
    return spec


def _padded(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Zeros for input channels of patches that a model without a first frame does not have, at the end."""
    return np.pad(value, [(0, needed - size) for size, needed in zip(value.shape, shape, strict=True)])


def _underscored(source: str) -> str:
    stem, _, tensor = source.rpartition(".")
    return f"{stem.replace('.', '_')}.{tensor}"


def _read(weights: WeightsFile, key: str) -> np.ndarray:
    return np.asarray(weights.read(key)).astype(np.float32)


def _adapter_settings(path: Path) -> Mapping[str, Any]:
    """Settings of peft: in `adapter_config.json` beside its file, or in the metadata of diffusers' file."""
    beside = path.with_name("adapter_config.json")
    if path.name.startswith("adapter_model") and beside.is_file():
        try:
            settings = parse_json(beside.read_text(encoding="utf-8"))
        except ValueError as error:
            raise WeightsError(f"{beside}: is not JSON ({error})") from error
        return settings if isinstance(settings, dict) else {}
    try:
        text = (safe_open(path, framework="numpy").metadata() or {}).get("lora_adapter_metadata", "{}")
        settings = json.loads(text)
    except (SafetensorError, ValueError, OSError):  # of another kind, which has no metadata
        return {}
    prefix = "transformer."
    settings = settings if isinstance(settings, dict) else {}
    return {k.removeprefix(prefix): x for k, x in settings.items() if k.startswith(prefix)}
