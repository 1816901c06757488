"""Continues prompts (decoders) or fills in the masked spans of passages (encoder-decoders).

python scripts/generate.py --workdir=runs/quickstart/switch --prompt="In the <extra_id_0> God created the <extra_id_1>."
python scripts/generate.py --workdir=runs/glam --prompt="In the beginning" --method=sample --temperature=0.8 --top_p=0.9
python scripts/generate.py --workdir=runs/glam --prompt="In the beginning" --method=beam --num_beams=4
"""

from collections.abc import Sequence
from pathlib import Path

from switchjax import command, process_settings
from switchjax.config import DecodingConfig, MeshConfig, check_seed, load_workdir_config


def main(arguments: Sequence[str]) -> None:
    parser = command.make_parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="a run's workdir")
    prompt = "a text to continue, or a passage with <extra_id_0>, <extra_id_1>, ...; repeat for more prompts"
    parser.add_argument("--prompt", action="append", required=True, help=prompt)
    parser.add_argument("--step", type=int, default=-1, help="step of the checkpoint; -1 (default): the latest")
    default = DecodingConfig()
    parser.add_argument("--method", default=default.method, help="greedy (default), sample or beam")
    tokens = "most new tokens per prompt; default: 64, or data.decoder_length for an encoder-decoder"
    parser.add_argument("--max_new_tokens", type=int, help=tokens)
    parser.add_argument("--temperature", type=float, default=default.temperature, help="sample: divides the logits")
    parser.add_argument(
        "--top_k", type=int, default=default.top_k, help="sample: choose only from the k most probable tokens; 0: all"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=default.top_p,
        help="sample: choose only from the most probable tokens with this total probability",
    )
    parser.add_argument("--num_beams", type=int, default=default.num_beams, help="beam: number of beams")
    parser.add_argument(
        "--length_penalty",
        type=float,
        default=default.length_penalty,
        help="beam: exponent of the length penalty; 0: none",
    )
    parser.add_argument("--seed", type=int, default=0, help="sample: random seed")
    axes = ("DATA", "EXPERT", "MODEL")
    parser.add_argument("--mesh", nargs=3, type=int, metavar=axes, help="sizes of the mesh axes; default: one device")
    flags = parser.parse_args(arguments)
    check_seed("--seed", flags.seed)
    config = load_workdir_config(flags.workdir)
    fills_in = config.model.family == "encoder_decoder"
    most = config.data.decoder_length if fills_in else default.max_new_tokens
    decoding = DecodingConfig(
        flags.method,
        most if flags.max_new_tokens is None else flags.max_new_tokens,
        flags.temperature,
        flags.top_k,
        flags.top_p,
        flags.num_beams,
        flags.length_penalty,
    )

    process_settings.keep_freed_memory()

    import jax

    from switchjax.inference.pretrained import load_pretrained
    from switchjax.inference.text import complete, fill_in
    from switchjax.parallel.mesh import emulate_devices, make_mesh

    if flags.mesh:
        emulate_devices(config.mesh)
    mesh = make_mesh(MeshConfig(*flags.mesh)) if flags.mesh else make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        pretrained = load_pretrained(flags.workdir, mesh, flags.step)
        key = jax.random.key(flags.seed)
        if fills_in:
            print("\n".join(fill_in(pretrained, flags.prompt, decoding, key)))
        else:
            answers = complete(pretrained, flags.prompt, decoding, key)
            print("\n".join(prompt + answer for prompt, answer in zip(flags.prompt, answers, strict=True)))


if __name__ == "__main__":
    command.run(main)
