"""What may meet what on a device: on a card, what the card does; elsewhere, what the simulated device does."""

import copy

import pytest
import torch
from torch import nn


@pytest.fixture
def here(device):
    """Return a matrix on the device."""
    return torch.arange(12.0).reshape(3, 4).to(device)


ALLOWED = {
    "a number of the CPU": lambda x: x * torch.tensor(2.0),
    "a number of the CPU to choose": lambda x: torch.where(x > 1, x, torch.tensor(0.0)),
    "a number of the CPU to put": lambda x: x.index_put_((torch.tensor([0]),), torch.tensor(1.0)),
    "an index of the CPU": lambda x: x[torch.tensor([0, 2])],
    "a mask of the CPU": lambda x: x[torch.tensor([True, False, True])],
    "what is made alike": lambda x: x + torch.zeros_like(x),
    "what is made there": lambda x: x + torch.ones(4, device=x.device),
    "what is listed there": lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device),
    "its own generator": lambda x: torch.empty_like(x).uniform_(),
    "a copy from the CPU": lambda x: x.copy_(torch.ones(3, 4)),
    "rows set from the CPU": lambda x: x[0].copy_(torch.ones(4)),
    "its decomposition": lambda x: torch.linalg.svd(x, full_matrices=False).Vh,
}
REFUSED = {
    "a vector of the CPU": lambda x: x + torch.ones(4),
    "one value of the CPU": lambda x: x + torch.ones(1),
    "a destination on the CPU": lambda x: torch.ones(3, 4).add_(x),
    "a number of the CPU as destination": lambda x: torch.tensor(1.0).add_(x.sum()),
    "a named destination on the CPU": lambda x: torch.add(x, x, out=torch.empty(3, 4)),
    "a factor of the CPU": lambda x: x @ torch.ones(4, 2),
    "a join": lambda x: torch.cat([x, torch.ones(1, 4)]),
    "a stack": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "a gather": lambda x: x.gather(1, torch.zeros(3, 1, dtype=torch.int64)),
    "places of the CPU": lambda x: x.index_select(0, torch.tensor([1])),
    "boundaries of the CPU": lambda x: torch.searchsorted(torch.ones(4), x),
    "a mask of the CPU to fill": lambda x: x.masked_fill_(torch.ones(3, 4, dtype=torch.bool), 0.0),
    "values of the CPU to put": lambda x: x.index_put_((torch.tensor([0]),), torch.ones(1, 4)),
    "a comparison": lambda x: torch.equal(x, torch.ones(3, 4)),
    "an index of the device": lambda x: torch.ones(12)[x.long()],
    "a generator of the CPU": lambda x: torch.rand(3, generator=torch.Generator(), device=x.device),
    "a generator of the CPU in place": lambda x: x.normal_(generator=torch.Generator()),
}


@pytest.mark.parametrize("work", ALLOWED.values(), ids=ALLOWED)
def test_what_may_meet(here, work):
    assert work(here).device == here.device


@pytest.mark.parametrize("work", REFUSED.values(), ids=REFUSED)
def test_what_may_not(here, work):
    with pytest.raises(RuntimeError, match="same device|indices should be|device type for generator|but got"):
        work(here)


def test_values_come_back(here):
    held = here.cpu()
    assert held.device.type == "cpu" and type(held) is torch.Tensor
    assert here.tolist() == held.tolist() and here.sum().item() == 66
    target = torch.zeros(3, 4)
    target.copy_(here)
    target[0] = here[1]
    assert target.tolist() == [held[1].tolist(), held[1].tolist(), held[2].tolist()]
    with pytest.raises(TypeError, match="to numpy"):
        here.numpy()


def test_views_of_one_tensor_are_known_by_their_place(here):
    assert here.detach().data_ptr() == here.data_ptr() == here[0].data_ptr() != here[1].data_ptr()
    assert copy.deepcopy(here).data_ptr() != here.data_ptr() and here.to(here.device) is here
    view = here[1]
    view.mul_(0)
    assert here.sum().item() == 44


def test_gradients_stay_and_cross(here):
    kept = torch.ones(4, device=here.device, requires_grad=True)
    sent = torch.ones(4, requires_grad=True)
    (here @ (kept * sent.to(here.device))).sum().backward()
    assert kept.grad is not None and kept.grad.device == here.device and sent.grad is not None
    assert sent.grad.device.type == "cpu" and sent.grad.tolist() == kept.grad.tolist() == [12, 15, 18, 21]
    with torch.inference_mode():
        assert (here + 1).sum().item() == 78


def test_modules_and_optimisers_run_there(device):
    module = nn.Linear(4, 2).to(device)
    before = module.weight.detach().clone()
    optimiser = torch.optim.Adam(module.parameters())
    module(torch.ones(3, 4, device=device)).sum().backward()
    optimiser.step()
    assert module.weight.device == device and not torch.equal(before, module.weight)
    with pytest.raises(RuntimeError, match="same device"):
        module(torch.ones(3, 4))


def test_what_is_made_there_has_its_size(device):
    made = [torch.arange(*ends, device=device) for ends in ((4,), (1, 3), (1.0, 3.0, 0.5))]
    assert [len(each) for each in made] == [4, 2, 4] and made[2].tolist() == [1.0, 1.5, 2.0, 2.5]


def test_values_may_be_put_in_the_place_of_others(device):
    kept = torch.nn.Parameter(torch.ones(2).to(device))
    before, kept.data = kept.data, torch.zeros(2).to(device)
    assert (kept + 1).tolist() == [1.0, 1.0] and before.tolist() == [1.0, 1.0]
