"""Named hardware: what one device computes, holds and exchanges, from a data file with its sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from nano_pretrain.platform.cuda_limits import check_kernels
from nano_pretrain.recipe.derived import parameter_dtype, stage_layout
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.rules_gpu import refuse_on_cpu
from nano_pretrain.recipe.rules_precision import without_fp8
from nano_pretrain.recipe.schema import Recipe

DIRECTORY = Path(__file__).parent / "hardware"
FORMATS = ("fp32", "bf16", "fp8")
SHARES = (*FORMATS, "attention", "scan", "memory", "link", "network")
_NULLABLE = ("memory_gigabytes", "tflops.fp8")
_FIX = "write it as in nano_pretrain/plan/hardware/h100.yaml"


@dataclass(frozen=True)
class Device:
    """One device of a cluster of equal ones.

    Attributes:
        name: for people.
        platform: cuda or cpu, whose kernels run.
        tflops: format -> dense peak of matrix products in TFLOP/s; None where there is none.
        shares: kind of kernel -> share of the peak, or of the bandwidth, that it reaches.
        memory_gigabytes: memory in 10^9 bytes; None is not compared with.
        memory_bandwidth: peak in GB/s.
        link_bandwidth: between the devices of a node, in one direction, GB/s.
        network_bandwidth: of one device to other nodes, in one direction, GB/s.
        devices_per_node: how many share the links.
        watts: of one device at full load, nothing around it.
    """

    name: str
    platform: Literal["cuda", "cpu"]
    tflops: Mapping[str, float | None]
    shares: Mapping[str, float]
    memory_gigabytes: float | None
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    devices_per_node: int
    watts: float

    def peak(self, number_format: str) -> float:
        """Dense FLOP/s of matrix products.

        Raises:
            RecipeError: the device has no such products.
        """
        tflops = self.tflops[number_format]
        if tflops is None:
            problem = f"{self.name} has no {number_format.upper()} products"
            raise RecipeError("plan.hardware", problem, f"write {without_fp8()}")
        return tflops * 1e12

    def core_rate(self, kind: str, number_format: str) -> float:
        """FLOP/s that a kernel reaches: `matrix`, or `attention` and `scan`, which never compute in FP8.

        Raises:
            RecipeError: as `peak`.
        """
        share = number_format if kind == "matrix" else kind
        return self.peak(number_format) * self.shares[share]

    @property
    def memory_rate(self) -> float:
        """Bytes/s between memory and cores that kernels reach."""
        return self.memory_bandwidth * 1e9 * self.shares["memory"]

    @property
    def link_rate(self) -> float:
        """Bytes/s that a rank sends to the ranks of its node."""
        return self.link_bandwidth * 1e9 * self.shares["link"]

    @property
    def network_rate(self) -> float:
        """Bytes/s that a rank sends to other nodes."""
        return self.network_bandwidth * 1e9 * self.shares["network"]

    @property
    def memory_bytes(self) -> float | None:
        """Memory in bytes, or None."""
        return None if self.memory_gigabytes is None else self.memory_gigabytes * 1e9

    def as_dict(self) -> dict[str, Any]:
        """Its numbers, as in the file."""
        return asdict(self)


def load_device(recipe: Recipe) -> Device:
    """The hardware that `plan.hardware` names, with `cluster.peak_tflops` in place of its own peak where given.

    Raises:
        RecipeError: there is no such hardware, or its file is not as it should be.
    """
    device = _from_file(_path(recipe.plan.hardware))
    stated = recipe.cluster.peak_tflops
    if stated is None:
        return device
    parameters = "fp32" if parameter_dtype(recipe.precision) == "float32" else "bf16"
    ratio = stated * 1e12 / device.peak(parameters)
    return replace(device, tflops={name: value and value * ratio for name, value in device.tflops.items()})


def check_platform(recipe: Recipe, stage_name: str, device: Device) -> None:
    """Refuse a stage that the hardware's kind of platform cannot train.

    Raises:
        RecipeError: it asks for GPUs on a CPU, or for what GPUs have no kernels for.
    """
    if device.platform == "cuda":
        check_kernels(recipe, stage_name)
    else:
        refuse_on_cpu(recipe, stage_layout(recipe, recipe.stages[stage_name]))


def _path(name: str) -> Path:
    """A file of the package, or of the user where the name ends in .yaml."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    known = sorted(path.stem for path in DIRECTORY.glob("*.yaml"))
    if name not in known:
        raise RecipeError(
            "plan.hardware", f"no hardware {name!r}", f"choose one of {', '.join(known)}, or write the path of a .yaml"
        )
    return DIRECTORY / f"{name}.yaml"


def _from_file(path: Path) -> Device:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = str(error).partition("\n")[0]
        raise RecipeError("plan.hardware", f"{path} cannot be read ({problem})", "choose another file") from error
    expected = {
        "": [item.name for item in fields(Device)],
        "tflops": list(FORMATS),
        "shares": list(SHARES),
    }
    for group, names in expected.items():
        _check_keys(path, group, content[group] if group else content, names)
    return Device(**content)


def _check_keys(path: Path, group: str, content: Any, names: list[str]) -> None:
    if not isinstance(content, dict) or sorted(content) != sorted(names):
        where = f"{path}: {group}" if group else str(path)
        raise RecipeError("plan.hardware", f"{where} does not hold exactly {', '.join(names)}", _FIX)
    for name, value in content.items():
        full = f"{group}.{name}".lstrip(".")
        if name in ("name", "platform", "tflops", "shares") or (value is None and full in _NULLABLE):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise RecipeError("plan.hardware", f"{path}: {full} is {value!r}, no number above 0", _FIX)
    if not group and content["platform"] not in ("cuda", "cpu"):
        raise RecipeError("plan.hardware", f"{path}: platform is {content['platform']!r}", "write cuda or cpu")
