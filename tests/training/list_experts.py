"""A mixture of experts as a list of modules, as code that comes with a checkpoint has it: a token
visits one of them.

transformers itself keeps a layer's experts in one weight, which every rank reads whatever its
tokens choose.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM


class ListExpertsConfig(Qwen3Config):
    model_type = "list_experts"
    num_experts: int = 8


class ListMoeBlock(nn.Module):
    def __init__(self, config: ListExpertsConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            for _ in range(config.num_experts)
        )

    def forward(self, hidden_BLH: torch.Tensor) -> torch.Tensor:
        hidden_NH = hidden_BLH.flatten(0, 1)
        weight_N, chosen_N = self.gate(hidden_NH).softmax(-1).max(-1)
        output_NH = torch.zeros_like(hidden_NH)
        for index in chosen_N.unique():
            rows = (chosen_N == index).nonzero().squeeze(1)
            output_NH = output_NH.index_add(
                0, rows, self.experts[index](hidden_NH[rows]) * weight_N[rows, None]
            )
        return output_NH.view_as(hidden_BLH)


class ListExpertsForCausalLM(Qwen3ForCausalLM):
    config_class = ListExpertsConfig

    def __init__(self, config: ListExpertsConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ListMoeBlock(config)
        self.post_init()


AutoConfig.register("list_experts", ListExpertsConfig)
AutoModelForCausalLM.register(ListExpertsConfig, ListExpertsForCausalLM)
