"""What a domain adapter is compared with: LoRA, and continued pre-training of all weights, on the same text.

    python benchmarks/domain.py lora --tokens 150000 --lr 2e-3 -o lora        # the usual adapter, rank 8
    python benchmarks/domain.py full --tokens 150000 --lr 5e-5 -o continued   # all weights train
    factormix eval lora --against asset:smollm2 --text asset:pubmed-test --text asset:brown-heldout

The knowledge, its windows, their order, the loss and the loop are those of `factormix inject`; what it takes besides,
general text for L_S, these two do not see. The result is a plain model directory (LoRA merged into it). The record of
the run lies beside it as OUT.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from factormix.cli.models import locate, locate_text, open_model, open_tokenizer
from factormix.mix import InjectConfig
from factormix.mix.batches import stage1_batches
from factormix.mix.losses import InjectionLoss
from factormix.mix.stage1 import learns_by
from factormix.train import LoopConfig, train


def main(options: argparse.Namespace) -> None:
    source = locate(options.model)
    tokenizer, model = open_tokenizer(source), open_model(source)
    mask = tokenizer.mask_token_id if learns_by(model) == "masked" else None
    text = locate_text([options.knowledge])
    config = InjectConfig(
        tokens=options.tokens, batch_tokens=options.batch_tokens, lr=options.lr, weight_decay=options.weight_decay,
        knowledge_weight=1.0, old_knowledge="none", seed=options.seed,
    )  # fmt: skip
    batches = stage1_batches(
        text, [str(path) for path in text], tokenizer, window=config.window, tokens=config.tokens, seed=config.seed
    )
    torch.manual_seed(config.seed)
    if options.method == "lora":
        adapted = get_peft_model(
            model, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
        )
        trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    else:
        adapted = model
        trained = [name for name, _ in model.named_parameters()]
    loss = InjectionLoss(model, "", config, mask)  # without adapters: L_K alone
    with tempfile.TemporaryDirectory() as scratch:
        loop = LoopConfig.of(config, save_steps=10**9)
        done = train(adapted, batches, loss, dict.fromkeys(trained, config.lr), loop, scratch, label=options.method)
    merged = adapted.merge_and_unload() if options.method == "lora" else model
    merged.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    share = done.params_trained / sum(p.numel() for p in model.parameters())
    print(f"{options.method}: {done.params_trained:,} parameters ({100 * share:.2f} %), {done.tokens:,} tokens, "
          f"{done.seconds:.0f} s, {done.peak_bytes / 2**30:.2f} GiB at most")  # fmt: skip
    record = {"options": {**vars(options), "out": str(options.out)}, "share": share, **asdict(done)}
    Path(f"{options.out}.json").write_text(json.dumps(record, indent=2), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("method", choices=("lora", "full"))
    parser.add_argument("--model", default="asset:smollm2")
    parser.add_argument("--knowledge", default="asset:pubmed-train")
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--rank", type=int, default=8, help="of LoRA, on all linear layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True)
    main(parser.parse_args())
