"""Makes tests/interop/fixtures with transformers itself, in a Python that has it and torch:

python tests/interop/make_fixtures.py

Each folder holds a tiny random model as `save_pretrained` writes it, inputs with the logits that it makes of them in
float32 (expected.safetensors), and of some models a loss and a summary of its gradient (expected.json). shapes.json
holds the names, types and shapes of further models' tensors.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parent / "fixtures"
ROWS, ENCODER, DECODER, VOCABULARY = 3, 12, 8, 40
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
SWITCH = T5 | {"num_experts": 4, "expert_capacity": 2, "router_aux_loss_coef": 0.02, "router_z_loss_coef": 0.01}
MIXTRAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "max_position_embeddings": 64,
    "router_aux_loss_coef": 0.02,
}
VIT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 2,
    "num_labels": 5,
}


def layers(num_layers: int, num_decoder_layers: int, step: int) -> dict[str, int]:
    """The config of a Switch Transformer in which every `step`-th layer has experts."""
    sparse = {"num_sparse_encoder_layers": num_layers // step, "num_sparse_decoder_layers": num_decoder_layers // step}
    return {"num_layers": num_layers, "num_decoder_layers": num_decoder_layers, **sparse}


# Those with logits.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5_v1_0": ("T5", T5 | {"num_layers": 2, "num_decoder_layers": 3}),
    "t5_v1_1": (
        "T5",
        T5 | {"num_layers": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    # One sparse layer a stack, for which the losses are the same.
    "switch": ("SwitchTransformers", SWITCH | layers(2, 2, 2)),
    "switch_deep": ("SwitchTransformers", SWITCH | layers(4, 2, 1) | {"tie_word_embeddings": False}),
    # One layer, for the same reason.
    "mixtral": ("Mixtral", MIXTRAL | {"num_hidden_layers": 1}),
    "mixtral_deep": (
        "Mixtral",
        MIXTRAL
        | {"num_hidden_layers": 2, "sliding_window": 4, "head_dim": 6, "rope_theta": 100.0, "rms_norm_eps": 0.1},
    ),
    "vit": ("ViT", VIT | {"num_hidden_layers": 2}),
}
WITH_LOSS = ("switch", "mixtral")

# Those with names and shapes alone.
SHAPES: dict[str, tuple[str, dict[str, Any], str]] = {
    "t5_gated_silu": (
        "T5",
        T5 | {"num_layers": 1, "num_decoder_layers": 2, "feed_forward_proj": "gated-silu"},
        "float32",
    ),
    "t5_bfloat16": ("T5", T5 | {"num_layers": 2}, "bfloat16"),
    "switch_step_1": ("SwitchTransformers", SWITCH | layers(2, 3, 1), "float32"),
    "switch_step_2": ("SwitchTransformers", SWITCH | layers(4, 2, 2), "bfloat16"),
    "switch_step_4": ("SwitchTransformers", SWITCH | layers(8, 4, 4), "float32"),
    "switch_one_expert": ("SwitchTransformers", SWITCH | layers(2, 2, 2) | {"num_experts": 1}, "float32"),
    "mixtral_tied": ("Mixtral", MIXTRAL | {"num_hidden_layers": 2, "tie_word_embeddings": True}, "float32"),
    "mixtral_one_group": ("Mixtral", MIXTRAL | {"num_hidden_layers": 1, "num_key_value_heads": 1}, "bfloat16"),
    "vit_deep": ("ViT", VIT | {"num_hidden_layers": 3, "hidden_act": "gelu_new"}, "float32"),
}
HEADS = {
    "T5": "T5ForConditionalGeneration",
    "SwitchTransformers": "SwitchTransformersForConditionalGeneration",
    "Mixtral": "MixtralForCausalLM",
    "ViT": "ViTForImageClassification",
}


def make_model(family: str, settings: dict[str, Any]) -> torch.nn.Module:
    """Sets random weights, so that no norm is 1, no bias is 0 and no two heads are equal."""
    model = getattr(transformers, HEADS[family])(getattr(transformers, f"{family}Config")(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            # Weights of a router are larger, so that no two of its logits are close.
            deviation = 1.0 if "router" in name or ".gate.weight" in name else 0.3
            parameter.normal_(mean, deviation)
        for name, parameter in model.named_parameters():
            if name.endswith("embed_tokens.weight") and hasattr(model, "shared"):
                parameter.copy_(model.shared.weight)  # untied, Switch has three
    return model.eval()


def save(model: torch.nn.Module, family: str, folder: Path) -> torch.nn.Module:
    """Saves as `save_pretrained` does; T5 v1.1 gets its own lm_head, which the class would tie."""
    model.save_pretrained(folder)
    if model.config.model_type == "t5" and not model.config.scale_decoder_outputs:
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = torch.randn(VOCABULARY, T5["d_model"]) * 0.3
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = getattr(transformers, HEADS[family]).from_pretrained(folder, attn_implementation="eager")
    model.save_pretrained(folder)
    return model.eval()


def inputs_of(family: str, padded: bool) -> dict[str, torch.Tensor]:
    """Rows of ids, of which all but the first are shorter if padded; or pixels that correspond to bytes."""
    if family == "ViT":
        size = (ROWS, VIT["num_channels"], VIT["image_size"], VIT["image_size"])
        return {"pixel_values": torch.randint(0, 256, size).float() / 127.5 - 1}
    sides = {"": ENCODER, "decoder_": DECODER} if family != "Mixtral" else {"": ENCODER}
    arrays = {}
    for prefix, length in sides.items():
        lengths = torch.tensor([length - 3 * row * padded for row in range(ROWS)]).clamp(min=2)
        mask = (torch.arange(length)[None] < lengths[:, None]).long()
        arrays[f"{prefix}input_ids"] = torch.randint(1, VOCABULARY, (ROWS, length)) * mask
        arrays[f"{prefix}attention_mask"] = mask
    return arrays


def loss_and_gradients(model: torch.nn.Module, arrays: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The loss with the router's, and of each gradient its norm and its product with the weights.

    A Mixtral row at a time: its load-balance loss is one of all rows together, ours of each.
    """
    targets = arrays["targets"]
    ids = {name: values for name, values in arrays.items() if name.endswith("input_ids")}
    if "decoder_input_ids" in ids:
        output = model(**ids, labels=targets, output_router_logits=True)
        loss = output.loss
    else:
        outputs = [model(input_ids=row[None], output_router_logits=True) for row in ids["input_ids"]]
        logits = torch.cat([output.logits for output in outputs])
        balance = torch.stack([output.aux_loss for output in outputs]).mean()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss = loss + model.config.router_aux_loss_coef * balance
    loss.backward()
    # An expert that no token chose has no gradient.
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    revert = transformers.core_model_loading.revert_weight_conversion
    gradients = revert(model, gradients)
    weights = revert(model, {name: parameter.detach() for name, parameter in model.named_parameters()})
    products = {name: [float(g.norm()), float((g * weights[name]).sum())] for name, g in gradients.items()}
    return {"loss": float(loss.detach()), "gradients": products}


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    torch.manual_seed(0)
    for name, (family, settings) in MODELS.items():
        folder = FOLDER / name
        model = save(make_model(family, settings), family, folder)
        expected = inputs_of(family, padded=True)
        with torch.no_grad():
            expected["logits"] = model(**expected).logits
        if name in WITH_LOSS:
            full = inputs_of(family, padded=False)
            length = DECODER if "decoder_input_ids" in full else ENCODER
            full["targets"] = torch.randint(1, VOCABULARY, (ROWS, length))
            (folder / "expected.json").write_text(json.dumps(loss_and_gradients(model, full), indent=1) + "\n")
            expected |= {f"full/{key}": values for key, values in full.items()}
        save_file({key: values.contiguous() for key, values in expected.items()}, folder / "expected.safetensors")
        (folder / "generation_config.json").unlink(missing_ok=True)
    shapes = {}
    for name, (family, settings, dtype) in SHAPES.items():
        folder = FOLDER / name
        make_model(family, settings).to(getattr(torch, dtype)).save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        shapes[name] = {"config": config, "dtype": dtype, "tensors": {key: list(t.shape) for key, t in tensors.items()}}
        shutil.rmtree(folder)
    (FOLDER / "shapes.json").write_text(json.dumps(shapes, indent=None, sort_keys=True) + "\n")
    for path in FOLDER.rglob("*.safetensors"):
        path.chmod(0o644)
    print(f"made with transformers {transformers.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
