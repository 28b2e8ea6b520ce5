"""What `--help` shows, plain lines that lose nothing at 80 columns; and `--log-format`, which long commands share."""

import functools
import inspect
import shlex
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer
import typer.core

from gptoss_quantize.terminal import choose_log

# the options that most people need, shown first
COMMON: dict[str, tuple[str, ...]] = {
    "quantize": ("--method", "--fit", "--calibration", "--adapter", "--resume"),
    "evaluate": ("--baseline", "--text", "--tokens", "--adapter", "--json"),
    "compare": ("--baseline", "--report", "--tasks", "--profile", "--text"),
    "demo": ("--methods", "--overwrite"),
    "generate": ("--prompt", "--max-new-tokens", "--temperature", "--raw", "--device"),
    "chat": ("--system", "--temperature", "--max-new-tokens", "--show-thinking", "--device"),
    "plan": ("--gpu-memory", "--context", "--dense", "--details", "--json"),
    "export": ("--to", "--overwrite"),
    "import": ("--to", "--split", "--overwrite"),
    "verify": ("--baseline", "--runtime", "--text", "--exact", "--json"),
    "push": ("--private",),
}
EXAMPLES: dict[str, tuple[str, ...]] = {
    "quantize": (
        "gptoss-quantize quantize openai/gpt-oss-20b gpt-oss-20b-int4",
        "gptoss-quantize quantize my-finetune my-int4 --calibration chats.jsonl",
        "gptoss-quantize quantize openai/gpt-oss-20b mine --fit 12GiB",
        "gptoss-quantize quantize its-base mine --adapter my-lora --format auto",
    ),
    "evaluate": ("gptoss-quantize evaluate my-int4 --baseline my-finetune",),
    "compare": ("gptoss-quantize compare my-int4 --baseline my-finetune --report report",),
    "demo": ("gptoss-quantize demo demo-out",),
    "demo-model": ("gptoss-quantize demo-model demo-model", "gptoss-quantize demo-model demo-mxfp4 --mxfp4"),
    "synthetic-model": ("gptoss-quantize synthetic-model layer --like gpt-oss-120b --layers 1",),
    "env": ("gptoss-quantize env", "gptoss-quantize env --json"),
    "generate": ("gptoss-quantize generate my-int4 --prompt 'Why is the sky blue?'",),
    "chat": ("gptoss-quantize chat my-int4 --temperature 1",),
    "plan": (
        "gptoss-quantize plan 20b --gpu-memory 16GiB",
        "gptoss-quantize plan my-finetune --gpu-memory 12GiB --context 32768",
    ),
    "export": ("gptoss-quantize export my-int4 my-gguf --to gguf",),
    "import": ("gptoss-quantize import others-int4 ours",),
    "verify": ("gptoss-quantize verify my-int4 --baseline my-finetune",),
    "push": ("gptoss-quantize push my-int4 me/my-int4",),
}


class Command(typer.core.TyperCommand):
    """A command whose help has arguments, common options, the others, and examples."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections of the parameters."""
        common = COMMON.get(self.name or "", ())
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": [], "More options": []}
        place = {option: i for i, option in enumerate(common)}
        for param in sorted(self.get_params(ctx), key=lambda p: place.get((p.opts or [""])[0], len(place))):
            if (record := param.get_help_record(ctx)) is None:
                continue
            if param.param_type_name == "argument":
                sections["Arguments"].append(record)
            else:
                known = not common or param.opts[0] in place
                sections["Options" if known else "More options"].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, each on a line of its own that can be copied."""
        if examples := EXAMPLES.get(self.name or ""):
            with formatter.section("Examples"):
                for line in examples:
                    formatter.write(f"  {line}\n")


class LogFormat(StrEnum):
    """How a long work says how far it is, on stderr."""

    auto = "auto"
    plain = "plain"
    json = "json"


LOG_HELP = "Progress on stderr. auto: bars on a terminal, else plain, a line per step. json: an object per line."


def with_log_format(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command that takes `--log-format` too."""

    @functools.wraps(command)
    def run(*args: Any, log_format: LogFormat, **options: Any) -> Any:
        choose_log(log_format.value)
        return command(*args, **options)

    option = Annotated[LogFormat, typer.Option("--log-format", help=LOG_HELP, case_sensitive=False)]
    told = inspect.Parameter(
        "log_format", inspect.Parameter.KEYWORD_ONLY, default=LogFormat.auto, annotation=option
    )  # fmt: skip
    signature = inspect.signature(command)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), told])  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, "log_format": option}
    return run


def words_of(example: str) -> list[str]:
    """Return the arguments of an example, without the program's name."""
    return shlex.split(example)[1:]
