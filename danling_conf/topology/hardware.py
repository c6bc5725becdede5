"""Table of accelerators: memory, peak FLOP/s, bandwidths, and what the device itself takes.

A plan is made where none of them is present, so that what a data sheet says stands here, each with its source. An entry
of the user's own is a YAML file, `--gpu my.yaml`, which may start from one of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from danling_conf.schema.nearest import nearest
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation

GIB = 1 << 30
MIB = 1 << 20

GPUS_PER_NODE = 8
"""Of a node, where nothing else is said."""

DTYPES = ("float32", "tf32", "bfloat16", "float16", "float8")
"""Data types of a matrix product that have a peak of their own. `tf32` is float32 where torch may round to TF32."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """An accelerator, and the links of a machine that is built of it."""

    name: str
    memory: int
    """Bytes that torch reports as the device's total: what is left after error correction and the driver."""
    flops: Mapping[str, float]
    """Peak FLOP/s of dense matrix products by data type, as the maker states them."""
    hbm: float
    """Bytes a second from and to the device's memory."""
    link: float
    """Bytes a second to the other devices of a node, in each direction."""
    link_kind: str = "nvlink"
    """`nvlink` (or another switched fabric), or `pcie`."""
    network: float
    """Bytes a second of each device to other nodes, in each direction."""
    matmul_efficiency: float = 0.70
    """Share of the peak that large matrix products reach in a training step."""
    attention_efficiency: float = 0.60
    """Share of the peak that a fused attention kernel reaches, forward and backward, of the pairs that see each other.
    FlashAttention-2 reaches 50 to 73 % where it was written for (https://arxiv.org/abs/2307.08691)."""
    hbm_efficiency: float = 0.80
    """Share of the memory's bandwidth that operations reach."""
    link_efficiency: float = 0.80
    """Share of a link's bandwidth that a large collective reaches."""
    context: int = 512 * MIB
    """Bytes of the driver's context with the kernels that a run loads, outside of torch's allocator."""
    workspace: int = 16 * MIB
    """Bytes that cuBLAS takes as its workspaces."""
    reported_as: tuple[str, ...] = ()
    """Parts of the name that the driver reports for it."""
    sources: tuple[str, ...] = ()
    """Where these figures are from."""

    def peak(self, dtype: str, *, tf32: bool = False) -> float:
        """Peak FLOP/s for operands of a data type of torch (`bfloat16`); that of float32 for others."""
        if dtype.startswith("float8"):
            dtype = "float8"
        if tf32 and dtype == "float32":
            dtype = "tf32"
        return self.flops.get(dtype, self.flops["float32"])


def _gpu(
    name: str,
    memory_gib: float,
    tflops: tuple[float, float, float, float | None],
    hbm_gb: float,
    link_gb: float,
    network_gbit: float,
    *sources: str,
    **more: Any,
) -> Gpu:
    """An entry in the units of data sheets. `tflops`: float32, TF32, bfloat16 and float16, float8."""
    single, middle, half, quarter = tflops
    flops = {"float32": single, "tf32": middle, "bfloat16": half, "float16": half}
    if quarter is not None:
        flops["float8"] = quarter
    return Gpu(
        name=name,
        memory=int(memory_gib * GIB),
        flops={dtype: 1e12 * peak for dtype, peak in flops.items()},
        hbm=1e9 * hbm_gb,
        link=1e9 * link_gb,
        network=1e9 * network_gbit / 8,
        sources=sources,
        **more,
    )


_HOPPER_WORKSPACE = 64 * MIB
"""cuBLAS and cuBLASLt, 32 MiB each since Hopper (https://docs.nvidia.com/cuda/cublas/#cublassetworkspace)."""
_HOPPER: Mapping[str, Any] = {"workspace": _HOPPER_WORKSPACE, "attention_efficiency": 0.30}
"""Attention: FlashAttention-2, which torch takes, reaches 35 % of an H100 (https://arxiv.org/abs/2407.08608), and less
in its backward pass."""
_OTHER_ATTENTION = 0.30
"""Where FlashAttention-2 was not written for a device, or is not there: assumed to be as on Hopper."""
_TOTALS = "memory: the total that torch reports on it"
_NDR = "network: one 400 Gb/s adapter for each GPU, as in DGX H100"
_HDR = "network: one 200 Gb/s adapter for each GPU, as in DGX A100"
_H100_SHEET = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet (sparse figures halved)"

_A100_SHEET = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet.pdf"
_V100_SHEET = "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf"
_PCIE4, _PCIE5 = "link: PCIe 4.0 x16", "link: PCIe 5.0 x16"
_ASSUMED = "network: {} Gb/s for each GPU is assumed"

# A reported name may be a part of another one (`H100` of `H100 PCIe`): the more special entry stands first.
GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40", 39.4, (19.5, 156, 312, None), 1555, 300, 200, _A100_SHEET, _TOTALS, _HDR,
             matmul_efficiency=0.75, reported_as=("A100-SXM4-40GB", "A100-PCIE-40GB", "A100-SXM-40GB")),
        _gpu("a100-80", 79.1, (19.5, 156, 312, None), 2039, 300, 200, _A100_SHEET, _TOTALS, _HDR,
             matmul_efficiency=0.75, reported_as=("A100", "A800")),
        _gpu("h100-pcie", 79.1, (51, 378, 756, 1513), 2000, 64, 200, _H100_SHEET, _TOTALS, _PCIE5,
             _ASSUMED.format(200), link_kind="pcie", **_HOPPER, reported_as=("H100 PCIe",)),
        _gpu("h100-nvl", 93.0, (60, 417.5, 835, 1670.5), 3900, 300, 200, _H100_SHEET, _TOTALS,
             "link: NVLink bridges between pairs", _ASSUMED.format(200), **_HOPPER,
             reported_as=("H100 NVL",)),
        _gpu("h100", 79.1, (67, 494, 989, 1979), 3350, 450, 400, _H100_SHEET, _TOTALS, _NDR,
             **_HOPPER, reported_as=("H100", "H800")),
        _gpu("h100-96", 95.0, (67, 494, 989, 1979), 2400, 450, 400, _H100_SHEET, "memory and its bandwidth: "
             "HBM2e, https://github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_h100_202412_torchtitan.md",
             _NDR, "arithmetic: less of its peak, since it is run at 500 W there", matmul_efficiency=0.6,
             workspace=_HOPPER_WORKSPACE, attention_efficiency=0.26),
        _gpu("h200", 139.7, (67, 494, 989, 1979), 4800, 450, 400,
             "https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446", _TOTALS, _NDR,
             **_HOPPER, reported_as=("H200",)),
        _gpu("b200", 178.3, (75, 1125, 2250, 4500), 7700, 900, 400,
             "https://resources.nvidia.com/en-us-dgx-systems/dgx-b200-datasheet (of eight, sparse figures halved)",
             _TOTALS, _NDR, **_HOPPER, reported_as=("B200",)),
        _gpu("l40s", 44.5, (91.6, 183, 362, 733), 864, 32, 100,
             "https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413 (sparse figures halved)", _TOTALS,
             _PCIE4, _ASSUMED.format(100), link_kind="pcie", reported_as=("L40S",)),
        _gpu("l4", 22.0, (30.3, 60, 121, 242), 300, 32, 25,
             "https://resources.nvidia.com/en-us-data-center-overview/l4-gpu-datasheet (sparse figures halved)",
             _TOTALS, _PCIE4, _ASSUMED.format(25), link_kind="pcie", reported_as=("NVIDIA L4",)),
        _gpu("a10g", 22.0, (35, 35, 70, None), 600, 32, 12.5,
             "https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf", _TOTALS,
             _PCIE4, "network: 100 Gb/s for eight GPUs, as in AWS g5.48xlarge", link_kind="pcie",
             reported_as=("A10G",)),
        _gpu("a10", 22.0, (31.2, 62.5, 125, None), 600, 32, 25,
             "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf", _TOTALS,
             _PCIE4, _ASSUMED.format(25), link_kind="pcie", reported_as=("NVIDIA A10",)),
        _gpu("rtx4090", 23.6, (82.6, 82.6, 165.2, 330.3), 1008, 32, 25,
             "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf", _TOTALS,
             f"{_PCIE4}, without peer-to-peer", _ASSUMED.format(25), link_kind="pcie", link_efficiency=0.5,
             reported_as=("RTX 4090",)),
        _gpu("v100-32", 31.7, (15.7, 15.7, 125, None), 900, 150, 25, _V100_SHEET, _TOTALS,
             "bfloat16 is emulated, and slower than its peak here", _ASSUMED.format(25),
             attention_efficiency=_OTHER_ATTENTION, reported_as=("V100",)),
        _gpu("t4", 14.6, (8.1, 8.1, 65, None), 300, 16, 12.5,
             "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet.pdf",
             _TOTALS, "link: PCIe 3.0 x16", _ASSUMED.format(12.5), link_kind="pcie",
             attention_efficiency=_OTHER_ATTENTION, reported_as=("T4",)),
        _gpu("mi250x", 64.0, (47.9, 47.9, 191.5, None), 1638, 100, 100,
             "https://www.amd.com/content/dam/amd/en/documents/instinct-business-docs/product-briefs/"
             "instinct-mi250x-product-brief.pdf", "of one of its two dies, which are devices of their own",
             _ASSUMED.format(100), matmul_efficiency=0.55, attention_efficiency=_OTHER_ATTENTION,
             reported_as=("MI250X",)),
        _gpu("mi300x", 191.9, (163.4, 653.7, 1307.4, 2614.9), 5300, 448, 400,
             "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/"
             "amd-instinct-mi300x-data-sheet.pdf", _TOTALS,
             "link: seven Infinity Fabric links of 64 GB/s in each direction", _NDR, matmul_efficiency=0.55,
             attention_efficiency=_OTHER_ATTENTION,
             reported_as=("MI300X",)),
    )
}  # fmt: skip
"""Accelerators by the name that `--gpu` takes."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The devices that a plan is for."""

    gpu: Gpu
    gpus_per_node: int = GPUS_PER_NODE

    def crosses(self, group_size: int, stride: int) -> bool:
        """Whether neighbours of a group are on several nodes; ranks fill one node after another."""
        return group_size > 1 and group_size * stride > self.gpus_per_node

    def in_node(self, group_size: int, stride: int) -> int:
        """How many ranks of a group are on the same node."""
        return max(1, min(group_size, self.gpus_per_node // stride))


_FIELDS = {
    "name": str,
    "base": str,
    "memory_gib": float,
    "tflops": dict,
    "hbm_gb_per_s": float,
    "link_gb_per_s": float,
    "link_kind": str,
    "network_gbit_per_s": float,
    "matmul_efficiency": float,
    "attention_efficiency": float,
    "hbm_efficiency": float,
    "link_efficiency": float,
    "context_mib": float,
    "workspace_mib": float,
    "source": str,
}
_NEEDED = ("memory_gib", "tflops", "hbm_gb_per_s", "link_gb_per_s", "network_gbit_per_s")
_SCALES = {"memory": ("memory_gib", GIB), "hbm": ("hbm_gb_per_s", 1e9), "link": ("link_gb_per_s", 1e9),
           "network": ("network_gbit_per_s", 1e9 / 8), "context": ("context_mib", MIB),
           "workspace": ("workspace_mib", MIB)}  # fmt: skip
_SHARES = ("matmul_efficiency", "attention_efficiency", "hbm_efficiency", "link_efficiency")


def gpu_reported_as(name: str) -> Gpu | None:
    """The accelerator of a name that the driver reports, such as `NVIDIA H100 80GB HBM3`; None where none is known."""
    return next((gpu for gpu in GPUS.values() if any(part in name for part in gpu.reported_as)), None)


def find_gpu(name: str) -> Gpu:
    """The accelerator of a name, or of a YAML file.

    Raises:
        ConfigRefused: there is no such name or file, or the file has faults; all of them are reported.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        return _from_file(Path(name).expanduser())
    known = GPUS.get(name.lower())
    if known is None:
        raise ConfigRefused([_unknown("--gpu", name)])
    return known


def _unknown(path: str, name: str) -> Violation:
    near = nearest(name, GPUS)
    hint = f"did you mean {near}? " if near else ""
    own = "another one goes into a YAML file, --gpu my.yaml"
    return Violation(path, name, "there is no such accelerator", f"{hint}there are {', '.join(GPUS)}; {own}")


def _from_file(path: Path) -> Gpu:
    import yaml  # here, since whoever names no file should not pay for it

    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ConfigRefused([Violation("--gpu", path, f"it cannot be read: {reason}", "name a YAML file")]) from error
    if not isinstance(given, dict):
        fix = f"write {', '.join(_NEEDED)}, or base: h100 and what differs"
        raise ConfigRefused([Violation("--gpu", path, "it holds no mapping", fix)])
    faults = [*_faults(path, given)]
    if faults:
        raise ConfigRefused(faults)
    return _made(path, given)


def _faults(path: Path, given: Mapping[Any, Any]) -> Iterator[Violation]:
    base = given.get("base")
    if base is not None and str(base) not in GPUS:
        yield _unknown(f"{path}: base", str(base))
    for key, value in given.items():
        if key not in _FIELDS:
            near = nearest(str(key), _FIELDS)
            fix = f"did you mean {near}?" if near else f"there are {', '.join(_FIELDS)}"
            yield Violation(f"{path}: {key}", ABSENT, "there is no such entry of an accelerator", fix)
        elif _FIELDS[key] is float and not _positive(value):
            yield Violation(f"{path}: {key}", value, "it is a number above 0", f"write {key}: 80")
        elif key in _SHARES and value > 1:
            yield Violation(f"{path}: {key}", value, "it is a share of what the maker states, at most 1", "write 0.7")
        elif key == "link_kind" and value not in ("nvlink", "pcie"):
            yield Violation(f"{path}: {key}", value, "it is nvlink or pcie", "write nvlink for any switched fabric")
        elif key == "tflops":
            yield from _faults_of_peaks(path, value, whole=base is None)
    for key in _NEEDED if base is None else ():
        if key not in given:
            yield Violation(f"{path}: {key}", ABSENT, "it is missing", f"write {key}, or base: h100 to start from one")


def _faults_of_peaks(path: Path, value: Any, *, whole: bool) -> Iterator[Violation]:
    shown = "write tflops: {float32: 67, bfloat16: 989}"
    if not isinstance(value, dict) or not value:
        yield Violation(f"{path}: tflops", value, "it has TFLOP/s by data type", shown)
        return
    if whole and "float32" not in value:
        yield Violation(f"{path}: tflops.float32", ABSENT, "it is missing, and stands for types that have none", shown)
    for dtype, peak in value.items():
        if dtype not in DTYPES:
            near = nearest(str(dtype), DTYPES)
            fix = f"did you mean {near}?" if near else f"there are {', '.join(DTYPES)}"
            yield Violation(f"{path}: tflops.{dtype}", ABSENT, "there is no such data type", fix)
        elif not _positive(peak):
            yield Violation(f"{path}: tflops.{dtype}", peak, "it is a number above 0", shown)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _made(path: Path, given: Mapping[str, Any]) -> Gpu:
    values: dict[str, Any] = {}
    for name, (key, unit) in _SCALES.items():
        if key in given:
            values[name] = given[key] * unit
    for name in ("memory", "context", "workspace"):
        if name in values:
            values[name] = int(values[name])
    values |= {name: float(given[name]) for name in _SHARES if name in given}
    if "link_kind" in given:
        values["link_kind"] = given["link_kind"]
    base = GPUS[given["base"]] if "base" in given else None
    if "tflops" in given:
        peaks = {} if base is None else dict(base.flops)
        values["flops"] = peaks | {dtype: 1e12 * peak for dtype, peak in given["tflops"].items()}
    values["name"] = str(given.get("name", path.stem))
    values["sources"] = (str(path), *((str(given["source"]),) if "source" in given else ()))
    return Gpu(**values) if base is None else replace(base, **values)
