"""The frame tokeniser: codes, gradients through them, and a codebook that stays in use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fmdeploy.errors import ConfigError
from fmdeploy.teacher.objectives.vqvae import Codebook, FrameVAE, perplexity
from fmdeploy.training.ema import WeightAverage


def frames(count: int, kinds: int = 6) -> Tensor:
    """Frames (count, 2, 16, 16) made of a few kinds of 4 x 4 squares."""
    squares = (torch.rand(kinds, 2, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    which = torch.randint(kinds, (count, 4, 4), generator=torch.Generator().manual_seed(2))
    return squares[which].permute(0, 3, 1, 4, 2, 5).reshape(count, 2, 16, 16)


def vae(codes: int = 16, decay: float = 0.8) -> FrameVAE:
    torch.manual_seed(0)
    return FrameVAE(planes=2, size=16, grid=4, codes=codes, dim=4, hidden=32, decay=decay)


def trained(steps: int = 150) -> tuple[FrameVAE, list[dict[str, float]]]:
    model, x, log = vae(), frames(16), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(steps):
        draw = torch.rand(16, generator=torch.Generator().manual_seed(step))
        found, logits = model(x, draw)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, x) + 0.25 * found.commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append({name: float(value) for name, value in model.book.update(restart=step < steps // 2).items()})
    return model.eval(), log


@pytest.fixture(scope="module")
def learnt() -> tuple[FrameVAE, list[dict[str, float]]]:
    return trained()


def test_squares_are_put_back_where_they_came_from() -> None:
    model, x = vae(), frames(3)
    assert torch.equal(model.picture(model._squares(x)), x)


def test_codes_carry_the_frames(learnt: tuple[FrameVAE, list[dict[str, float]]]) -> None:
    model, x = learnt[0], frames(8)
    codes = model.codes(x)
    assert codes.shape == (8, 16)
    assert 5 <= len(set(codes.flatten().tolist())) <= 16  # two of the six kinds may share a code, no more
    decoded = model.picture(model.table()[codes].flatten(2))
    assert ((decoded > 0.5) == (x > 0.5)).float().mean() > 0.97
    found, logits = model(x)
    assert torch.equal(found.codes_BG, codes)
    assert torch.allclose(torch.sigmoid(logits), decoded, atol=1e-5)  # the table is the decoder, code by code


def test_perplexity_counts_the_codes_in_use(learnt: tuple[FrameVAE, list[dict[str, float]]]) -> None:
    assert perplexity(torch.full((8,), 3.0)) == pytest.approx(8)
    assert perplexity(torch.tensor([5.0, 0, 0])) == pytest.approx(1)
    assert learnt[1][0]["perplexity"] < 4 < learnt[1][-1]["perplexity"] <= 16


def test_the_gradient_goes_straight_through() -> None:
    book = Codebook(8, 3, 0.9)
    z = torch.randn(2, 5, 3, requires_grad=True)
    found, upstream = book(z), torch.randn(2, 5, 3)
    assert torch.allclose(found.vectors_BGD, book.codebook_KD[found.codes_BG])
    found.vectors_BGD.backward(upstream)
    assert z.grad is not None
    assert torch.equal(z.grad, upstream)
    assert not list(book.parameters())


def test_commitment_draws_the_encoder_to_the_code() -> None:
    book = Codebook(4, 3, 0.9)
    z = torch.randn(1, 6, 3, requires_grad=True)
    found = book(z)
    found.commitment.backward()
    assert z.grad is not None
    assert torch.allclose(z.grad, 2 * (z - book.codebook_KD[found.codes_BG]).detach() / z.numel())


def test_codes_follow_the_mean_of_what_is_assigned() -> None:
    book = Codebook(2, 2, 0.5)
    book.codebook_KD.copy_(torch.tensor([[0.0, 0.0], [9.0, 9.0]]))
    z = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [8.0, 8.0]]])
    for _ in range(3):
        book(z, torch.zeros(1))
        book.update(restart=False)
    assert torch.allclose(book.codebook_KD, torch.tensor([[0.5, 0.5], [8.0, 8.0]]))


def test_dead_codes_are_revived_where_the_book_is_bad_and_only_when_asked() -> None:
    far = torch.tensor([7.0, -7.0])
    z = torch.cat((torch.zeros(1, 30, 2), far.expand(1, 2, 2)), dim=1)
    for restart in (False, True):
        book = Codebook(8, 2, 0.9)
        book.codebook_KD.copy_(torch.full((8, 2), 50.0))
        book.codebook_KD[0] = 0
        restarted = 0.0
        for step in range(3):
            book(z, torch.tensor([0.1 + 0.3 * step]))
            seen = book.update(restart=restart)
            restarted += float(seen["restarted"])
        assert (book.nearest(far.view(1, 1, 2)) != book.nearest(torch.zeros(1, 1, 2))).item() is restart
        assert (restarted > 0) is restart
        assert (float(seen["perplexity"]) > 1.1) is restart


def test_parts_of_a_batch_move_the_book_as_the_whole_does() -> None:
    z, draw = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(3)), torch.tensor([0.1, 0.5, 0.7, 0.9])
    books = []
    for parts in (1, 2):
        torch.manual_seed(0)
        book = Codebook(16, 3, 0.9)
        for rows, share in zip(z.chunk(parts), draw.chunk(parts), strict=True):
            book(rows, share)
        book.update(restart=True)
        books.append(book.state_dict())
    for name, value in books[0].items():
        assert torch.allclose(value, books[1][name], atol=1e-6), name


def test_a_used_book_is_not_moved_by_looking() -> None:
    model = vae()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(frames(2))
    model.codes(frames(2))
    assert not model.book._parts
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_grid_that_does_not_tile_the_frame_is_refused() -> None:
    with pytest.raises(ConfigError, match="do not tile"):
        FrameVAE(planes=1, size=64, grid=10, codes=4, dim=4)


def test_averaged_weights_leave_the_tokeniser_as_it_is() -> None:
    model = torch.nn.ModuleDict({"vae": vae(), "other": torch.nn.Linear(2, 2)})
    average = WeightAverage(model, decay=0.9)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    average.update(model, step=1000)
    for name, value in model.state_dict().items():
        assert torch.equal(average.values[name], value) == name.startswith("vae."), name
