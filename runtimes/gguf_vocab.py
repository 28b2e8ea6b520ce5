"""A Hugging Face tokenizer as GGUF metadata, and the pre-tokenizer recognised by what it does.

llama.cpp keeps the pre-tokenizer (the expression that cuts text into words before BPE) as a name, and has the
expressions built in. A wrong name gives wrong tokens and no error, and tokenizer.json has no such name. So each known
pre-tokenizer is built here and run beside the model's own over a text in which all of them differ; the name is that
of the one that cuts it alike everywhere. An unknown one is refused, never guessed.
"""

import json
from pathlib import Path

import gguf
from tokenizers import Regex, Tokenizer, pre_tokenizers

from gptoss_quantize.config import ModelConfig, read_json
from gptoss_quantize.errors import InputError
from gptoss_quantize.tokenizer_files import SideFiles

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)

# llama.cpp's name -> what it does (src/llama-vocab.cpp)
PRE_TOKENIZERS: dict[str, pre_tokenizers.PreTokenizer] = {
    "gpt-4o": _split(_O200K),  # gpt-oss
    "llama-bpe": _split(_LLAMA3),
    "qwen2": _split(_LLAMA3.replace("{1,3}", "")),
    "gpt-2": _GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
}

# words, cases, contractions, digits, punctuation, line ends, runs of spaces, scripts, combining marks, emoji
PROBE = (
    "The quick Brown FOX isn't JUMPING; we'LL see, I'M sure they'd've... HelloWorld camelCase XMLHttp ÀÉîõ\n"
    "1 12 123 1234 12345 3.14159 1,000,000 x86 v2.0 ½ ² Ⅷ ٣٤٥\n\n\n  indented\ttabs\t\t and    spaces   \n"
    "a/b//c /// path/to/file.txt\r\n{'key': [1, 2]} <|start|> == != >= -> /* x */\n/// doc\n"
    "naïve café Ünïcödé नमस्ते हिन्दी 你好\uff0c世界\uff01 こんにちは 한국어 Привет мир مرحبا בעברית ไทย e\u0301 "
    "🚀👩\u200d👩\u200d👧 ✅!!??\n'tis 'S 'rE"
)


def recognise(tokenizer: Tokenizer, where: Path) -> str:
    """Return llama.cpp's name for a tokenizer's pre-tokenizer; InputError for one that it may not have."""
    own = tokenizer.pre_tokenizer
    pieces = None if own is None else [piece for piece, _ in own.pre_tokenize_str(PROBE)]
    for name, known in PRE_TOKENIZERS.items():
        if pieces == [piece for piece, _ in known.pre_tokenize_str(PROBE)]:
            return name
    raise InputError(
        f"{where}: its pre-tokenizer cuts text like none of {', '.join(PRE_TOKENIZERS)}, so llama.cpp would read "
        "other tokens than the model was trained on; use the tokenizer.json of the original model"
    )


def add_tokenizer(writer: gguf.GGUFWriter, side: SideFiles, config: ModelConfig) -> str:
    """Add tokens, types, merges, special tokens and chat template of a model; return the name of `pre`."""
    file = side.files.get("tokenizer.json", side.path / "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 tokenizers raises nothing narrower
        raise InputError(f"{file}: no tokenizer ({error}); copy it from the source model") from None
    raw = read_json(file)
    if raw.get("model", {}).get("type") != "BPE":
        raise InputError(f"{file}: a {raw.get('model', {}).get('type')} tokenizer; gpt-oss has byte-level BPE")
    if tokenizer.normalizer is not None:
        raise InputError(f"{file}: it normalises text first, which llama.cpp's BPE does not; take gpt-oss's own")
    pre = recognise(tokenizer, file)
    added = tokenizer.get_added_tokens_decoder()
    tokens, types = [], []
    vocab = {index: token for token, index in tokenizer.get_vocab(with_added_tokens=True).items()}
    if max(vocab) >= config.vocab:
        raise InputError(
            f"{file}: token id {max(vocab)}, but the model's vocabulary ends at {config.vocab - 1}; give the "
            "tokenizer that the model was trained with"
        )
    for index in range(config.vocab):
        token = vocab.get(index)
        tokens.append(f"[PAD{index}]" if token is None else token)
        if token is None:
            types.append(gguf.TokenType.UNUSED)
        elif index in added:
            looks_special = token.startswith("<|") and token.endswith("|>")
            control = added[index].special or looks_special
            types.append(gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    try:
        with side.staged() as folder:
            (folder / "config.json").write_text(json.dumps(config.raw), encoding="utf-8")
            special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=config.vocab)
    except (ValueError, AttributeError, TypeError, OSError) as error:
        # JSON and UTF-8 among them
        raise InputError(
            f"{side.path}: tokenizer_config.json, chat_template.jinja or generation_config.json cannot be read "
            f"({error}); correct them, or copy them from the model that it was made from"
        ) from None
    # what transformers would use, not what gguf finds
    template = side.template
    special.chat_template = (
        [{"name": name, "template": text} for name, text in template.items()]
        if isinstance(template, dict)
        else template
    )
    # by what it does, too: whether plain text gets a first or last token of its own
    ids = tokenizer.encode("a").ids
    special.add_special_token = {
        "bos": len(ids) > 1 and ids[0] == special.special_token_ids.get("bos"),
        "eos": len(ids) > 1 and ids[-1] == special.special_token_ids.get("eos"),
    }
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special.add_to_gguf(writer, quiet=True)
    return pre
