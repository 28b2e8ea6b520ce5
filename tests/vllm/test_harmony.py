"""A chat in OpenAI's own format: a model with gpt-oss's vocabulary keeps it, since vLLM writes it by token number."""

import pytest

openai = pytest.importorskip("openai")
openai_harmony = pytest.importorskip("openai_harmony")
MESSAGES = [{"role": "user", "content": "Tell me of the sea."}]


def test_a_chat_is_written_in_harmony(checkpoint, serve, tmp_path):
    # vLLM brings the vocabulary (oss-harmony): no network, and the tiny tokenizer knows none of it
    with serve(checkpoint("large vocabulary"), tmp_path / "log") as server:
        client = openai.OpenAI(base_url=server.url(), api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model="ours", messages=MESSAGES, max_tokens=4, temperature=0, extra_body={"return_token_ids": True}
        )
    harmony = openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
    text = harmony.decode(answer.prompt_token_ids)
    assert text.startswith("<|start|>system<|message|>You are ChatGPT")
    assert text.endswith("<|start|>user<|message|>Tell me of the sea.<|end|><|start|>assistant")


def test_only_our_checkpoints_without_harmony_lose_the_parser_of_thoughts(tiny, checkpoint):
    # in one process, ours first: the defaults of every other gpt-oss model stay vLLM's
    from vllm.engine.arg_utils import EngineArgs

    def parser(path, **options):
        built = EngineArgs(model=str(path), dtype="float32", max_model_len=64, **options).create_engine_config()
        return built.structured_outputs_config.reasoning_parser

    assert parser(checkpoint()) == ""
    assert parser(tiny.path()) == "openai_gptoss"
    assert parser(checkpoint("large vocabulary")) == "openai_gptoss"
    assert parser(checkpoint(), reasoning_parser="qwen3") == "qwen3"
