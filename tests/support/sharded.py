"""Run in each of several CPU processes: an adapted model sharded by FSDP2 trains and is saved like a whole one.

accelerate shards models on accelerators only, so this uses torch to do the same.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_histo.config import AdapterOptions
from hf_histo.models import adapters, backbones


def learn(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One large step of SGD."""
    F.binary_cross_entropy_with_logits(model(pixel_values=images).logits[:, 0], labels).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()


def main(backbone: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = adapters.add(backbones.load(backbone, 1, image_size=96), AdapterOptions())
    images, labels = torch.randn(2 * processes, 3, 96, 96), torch.arange(2.0 * processes) % 2
    sharded, spare = copy.deepcopy(whole), copy.deepcopy(whole)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (processes,)))
    assert all(type(p).__name__ == "DTensor" for p in sharded.parameters())

    before = {name: p.detach().clone() for name, p in whole.named_parameters()}
    learn(whole, images, labels)
    learn(sharded, images[2 * rank : 2 * rank + 2], labels[2 * rank : 2 * rank + 2])
    moved = [name for name, p in whole.named_parameters() if not torch.equal(p, before[name])]
    gathered = dict(adapters.gathered(sharded, spare).named_parameters())
    assert moved
    for name, p in whole.named_parameters():
        torch.testing.assert_close(gathered[name], p, rtol=0, atol=1e-6)

    adapters.save(sharded, folder / str(rank), batch_norm="frozen", writes=rank == 0)
    dist.barrier()
    assert [path.name for path in folder.iterdir()] == ["0"]
    saved = load_file(folder / "0" / "adapter_model.safetensors")
    for name, tensor in adapters.weights(whole, batch_norm="frozen").items():
        torch.testing.assert_close(saved.pop(name), tensor, rtol=0, atol=1e-6)
    assert not saved
    dist.destroy_process_group()
    print(f"process {rank} of {processes}: {len(moved)} weights moved")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
