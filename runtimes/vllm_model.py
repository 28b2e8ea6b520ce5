"""vLLM's own gpt-oss model, with every tensor of the checkpoint accounted for.

vLLM's loader passes over names that it does not know and does not look for those that are missing once a model is
quantized. Here both end the loading. Embedding and head, which vLLM builds without asking a quantization method, get
ours where the checkpoint has them in 8 bits; a tied head gets its own copy.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM

from gptoss_quantize.config import parse_config
from gptoss_quantize.errors import InputError
from gptoss_quantize.layouts import DENSE, INT4, dense_shapes

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class GptossQuantizeForCausalLM(GptOssForCausalLM):
    """GptOssForCausalLM for a checkpoint with our marker."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        if vllm_config.lora_config is not None:
            raise InputError(
                "--enable-lora: int4 experts take no adapter at run time; merge it when quantizing "
                "(gptoss-quantize quantize MODEL OUT --adapter ADAPTER)"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.quantization = vllm_config.quant_config
        if self.quantization.dense == "int8":
            shape = (self.config.vocab_size, self.config.hidden_size)
            self.model.embedding = VocabParallelEmbedding(*shape, quant_config=self.quantization, prefix="embedding")
            self.lm_head = ParallelLMHead(*shape, quant_config=self.quantization, prefix="lm_head")

    def expected(self) -> tuple[set[str], set[str]]:
        """Return the names of all tensors of the checkpoint, and of those that this rank needs."""
        config = parse_config(self.config.to_dict() | {"model_type": "gpt_oss"}, "config.json")
        layout = DENSE[self.quantization.dense]
        names = {part for name, shape in dense_shapes(config).items() for part in layout.parts(name, shape)}
        experts = next(module for module in self.modules() if isinstance(module, RoutedExperts))
        local = {e for e in range(config.experts) if experts._map_global_expert_id_to_local_expert_id(e) != -1}
        needed = set(names)
        for name in INT4.stored(config, self.quantization.group_size):
            of_layers = {f"model.layers.{i}.mlp.experts.{name}" for i in range(config.layers)}
            names |= of_layers
            needed |= of_layers if int(name.split(".")[0]) in local else set()
        return names, needed

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load by vLLM's loader; InputError for a tensor that is missing or that no gpt-oss has."""
        names, needed = self.expected()
        seen: set[str] = set()

        def watched() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name not in names:
                    raise InputError(f"{name}: not a tensor of this model; is config.json of another one?")
                seen.add(name)
                if name.startswith(EMBEDDING):
                    rest = name.removeprefix(EMBEDDING)
                    if self.config.tie_word_embeddings:
                        yield HEAD + rest, tensor
                    name = f"model.embedding.weight{rest}"
                yield name, tensor

        loaded = super().load_weights(watched())
        if missing := sorted(needed - seen):
            raise InputError(
                f"{len(missing)} tensors of the model are not in the checkpoint, first {missing[0]}; download or "
                "copy it again"
            )
        return loaded
