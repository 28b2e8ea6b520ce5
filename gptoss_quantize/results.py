"""What the public functions return: the report that is also written, and its main numbers under names.

`report` is always the whole record, as the JSON file holds it that the command of the same name writes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Quantized:
    """A checkpoint that `quantize` wrote; `report` is its quantization_report.json."""

    path: Path
    report: dict[str, Any]

    @property
    def bits_per_weight(self) -> float:
        """Return the bits of an expert weight, scales included."""
        return float(self.report["expert_bits_per_weight"])

    @property
    def size(self) -> int:
        """Return the bytes of all tensors."""
        return int(self.report["bytes"])

    @property
    def output_error(self) -> float | None:
        """Return the mean relative squared error of the experts' outputs; None for methods that see no text."""
        return None if (error := self.report["mean_output_error"]) is None else float(error)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """One candidate against the baseline on the same tokens; divergences in nats, errors over sequences."""

    perplexity: float
    baseline_perplexity: float
    kl_mean: float
    kl_mean_se: float | None  # None with fewer than two sequences
    kl_median: float
    kl_p99: float
    top1_agreement: float  # share of positions where both prefer the same token
    tokens: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` measured; `report` is what `evaluate --json` writes."""

    report: dict[str, Any]

    @property
    def results(self) -> dict[str, Fidelity]:
        """Return the numbers of each candidate by its name, in the order given."""
        names = Fidelity.__slots__
        return {
            name: Fidelity(**{field: found[field] for field in names})
            for name, found in self.report["results"].items()
        }

    def __getitem__(self, name: str) -> Fidelity:
        return self.results[name]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A report that `compare` wrote into `path`; `report` is its report.json (docs/report-json.md)."""

    path: Path
    report: dict[str, Any]

    @property
    def page(self) -> Path:
        """Return the page to open in a browser."""
        return self.path / "report.html"

    @property
    def verdicts(self) -> dict[str, str]:
        """Return equivalent, uncertain, unmeasured, worse or broken for each candidate."""
        return {entry["name"]: str(entry["verdict"]["level"]) for entry in self.report["candidates"]}

    @property
    def sentences(self) -> dict[str, str]:
        """Return the verdict on each candidate in words."""
        return {entry["name"]: str(entry["verdict"]["sentence"]) for entry in self.report["candidates"]}


@dataclass(frozen=True, slots=True)
class Written:
    """A directory that `export` or `import_checkpoint` wrote and read back; `report` is its export_report.json."""

    path: Path
    report: dict[str, Any]

    @property
    def size(self) -> int:
        """Return the bytes of all tensors."""
        return int(self.report["bytes"])


@dataclass(frozen=True, slots=True)
class Verification:
    """The lines of `verify`, one for each check in each runtime; `report` is what `verify --json` writes."""

    report: list[dict[str, Any]]

    @property
    def disagreeing(self) -> list[str]:
        """Return "runtime: check" for each line that disagrees or broke down; what was not checked is neither."""
        bad = ("DISAGREES", "FAILED")
        return [f"{row['runtime']}: {row['what']}" for row in self.report if row["verdict"] in bad]

    @property
    def agrees(self) -> bool:
        """Return whether predictions were judged, which needs a baseline, and nothing disagrees."""
        judged = [row for row in self.report if row["got"] is not None and row["verdict"] == "agrees"]
        return bool(judged) and not self.disagreeing


@dataclass(frozen=True, slots=True)
class Plan:
    """What a quantization would take and give; `report` is what `plan --json` writes."""

    report: dict[str, Any]

    @property
    def size(self) -> int:
        """Return the exact bytes of the weight files."""
        return int(self.report["disk"]["total"])

    @property
    def least_memory(self) -> int:
        """Return the bytes of memory that quantizing needs at least."""
        return int(self.report["memory"]["least"])

    @property
    def seconds(self) -> float | None:
        """Return the time that quantizing is expected to take on this machine; None where it was not measured."""
        return float(self.report["time"]["seconds"]) if "time" in self.report else None

    def fits(self, runtime: str, context: int) -> bool:
        """Return whether the result fits the card in a runtime ("vLLM", "llama.cpp") at one of the contexts."""
        rows = {(row["runtime"], row["context"]): bool(row["fits"]) for row in self.report["card"]}
        return rows[runtime, context]


@dataclass(frozen=True, slots=True)
class Pushed:
    """What `push` sent; `left` are names in the directory that were not, since they are not ours."""

    repo: str
    url: str  # of the commit
    files: list[str]
    left: list[str]
