"""Prompt files, the order of the prompts, and the annealed noise on their embeddings."""

import os

import numpy as np
import pytest
import torch

from prompting import Prompt, annealed_noise, draw_prompts, noised_prompt, read_prompts


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


# --------------------------------------------------------------------------------------------------
# Files.


@pytest.mark.parametrize(
    "content",
    [
        "a dark coat\nein weißer Schuh\n",
        "a dark coat\nein weißer Schuh",
        "a dark coat\r\nein weißer Schuh\r\n",
        "\ufeffa dark coat\nein weißer Schuh\n",
        "  a dark coat \n\tein weißer Schuh\n",
    ],
    ids=["plain", "no last newline", "CRLF", "BOM", "spaces"],
)
def test_text_files(tmp_path, content):
    prompts = read_prompts(write(tmp_path, "p.txt", content))
    assert prompts == [Prompt("a dark coat", {}), Prompt("ein weißer Schuh", {})]


@pytest.mark.parametrize("separator", ["\u2028", "\x0b", "\x85"])
def test_only_line_feeds_end_a_line(tmp_path, separator):
    text = f"a coat{separator}of wool"
    assert read_prompts(write(tmp_path, "p.txt", text)) == [Prompt(text, {})]


@pytest.mark.parametrize("end, start", [("\n", ""), ("\r\n", "\ufeff")], ids=["plain", "BOM, CRLF"])
def test_json_lines_keep_their_metadata(tmp_path, end, start):
    lines = [
        '{"prompt": " a dark coat ", "label": 4, "tags": ["x", {"y": null}]}',
        '{"label": 0, "prompt": "wei\\u00df"}',
        '{"prompt": "a bag"}',
    ]
    path = write(tmp_path, "p.jsonl", start + end.join(lines) + end)
    assert read_prompts(str(path)) == [
        Prompt("a dark coat", {"label": 4, "tags": ["x", {"y": None}]}),
        Prompt("weiß", {"label": 0}),
        Prompt("a bag", {}),
    ]


def test_equal_lines_stay_apart(tmp_path):
    prompts = read_prompts(write(tmp_path, "p.txt", "a\nb\na\n"))
    assert [prompt.text for prompt in prompts] == ["a", "b", "a"]


GOOD = '{"prompt": "a coat"}\n'


@pytest.mark.parametrize(
    "name, content, line, words",
    [
        ("p.txt", "a coat\n\na bag\n", 2, "empty prompt"),
        ("p.txt", "a coat\na bag\n   \n", 3, "empty prompt"),
        ("p.jsonl", GOOD + "\n" + GOOD, 2, "empty prompt"),
        ("p.jsonl", GOOD + '{"prompt": "  "}\n', 2, "empty prompt"),
        ("p.jsonl", GOOD + '{"prompt": "a bag"\n', 2, "not JSON"),
        ("p.jsonl", GOOD + '{"text": "a bag"}\n', 2, '"prompt"'),
        ("p.jsonl", GOOD + '{"prompt": 3}\n', 2, '"prompt"'),
        ("p.jsonl", GOOD + '["a bag"]\n', 2, "object"),
    ],
)
def test_a_bad_line_is_named(tmp_path, name, content, line, words):
    with pytest.raises(ValueError) as caught:
        read_prompts(write(tmp_path, name, content))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}:{line}: ")
    assert words in message and "\n" not in message


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("p.txt", "", "no prompts"),
        ("p.jsonl", "\ufeff", "no prompts"),
        ("p.txt", b"a coat\nein wei\xdfer Schuh\n", "UTF-8"),
        ("p.txt", "a coat".encode("utf-16"), "UTF-8"),
        ("p.csv", "a coat\n", ".jsonl"),
        ("p", "a coat\n", ".jsonl"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, words):
    with pytest.raises(ValueError) as caught:
        read_prompts(write(tmp_path, name, content))
    assert str(tmp_path / name) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("half", ["\\ud800", "\\udfff a", "a \\ud83d"])
def test_half_a_character_is_refused(tmp_path, half):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "{half} coat"}}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl:1: holds half a character"):
        read_prompts(path)


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.txt")
    (tmp_path / "q.txt").symlink_to("/dev/zero")
    for name in ("p.txt", "q.txt"):
        with pytest.raises(ValueError, match=f"{name}: is no regular file"):
            read_prompts(tmp_path / name)


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    for name in ("absent.jsonl", "folder.txt"):
        with pytest.raises(ValueError, match=name):
            read_prompts(tmp_path / name)


# --------------------------------------------------------------------------------------------------
# Order.


@pytest.mark.parametrize("total, count", [(10, 10), (7, 5), (12, 4), (3, 8), (1, 4)])
def test_each_prompt_once_a_pass(total, count):
    steps = 2 * total  # ends on a whole number of passes
    drawn = np.concatenate([draw_prompts(total, count, seed=5, step=step) for step in range(steps)])
    assert drawn.shape == (steps * count,)
    for one_pass in drawn.reshape(-1, total):
        assert sorted(one_pass) == list(range(total))


def test_passes_are_shuffled_anew():
    passes = [tuple(draw_prompts(20, 20, seed=0, step=step)) for step in range(6)]
    assert len(set(passes)) == 6
    assert tuple(range(20)) not in passes
    assert tuple(draw_prompts(20, 20, seed=1, step=0)) not in passes


def test_a_draw_is_a_function_of_seed_and_step():
    """Whatever was drawn before: a resumed run, or another process, goes on with the same."""
    in_order = [draw_prompts(13, 5, 3, step) for step in range(9)]
    np.random.seed(1)
    for step in (8, 2, 2, 0, 5):
        assert (draw_prompts(13, 5, 3, step) == in_order[step]).all()
    assert any((draw_prompts(13, 5, 4, step) != in_order[step]).any() for step in range(9))


# --------------------------------------------------------------------------------------------------
# Annealed noise.


def plain_cads(y, n, u, scale, tau1, tau2, psi):
    """CADS (arXiv 2310.17347, eq. 3 to 6) for one sample, in numpy."""
    gamma = np.clip((tau2 - u) / (tau2 - tau1), 0, 1)
    noised = np.sqrt(gamma) * y + scale * np.sqrt(1 - gamma) * n
    rescaled = (noised - noised.mean()) / noised.std(ddof=1) * y.std(ddof=1) + y.mean()
    return psi * rescaled + (1 - psi) * noised


def embedding_and_noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    embedding = 0.5 + 2 * torch.randn(shape, generator=generator)
    return embedding, torch.randn(shape, generator=generator)


@pytest.mark.parametrize(
    "psi, shape, tau1, tau2",
    [
        (1.0, (6, 5, 8), 0.6, 0.9),
        (0.3, (6, 12), 0.2, 1.2),
        (0.0, (6, 5, 8), 0.0, 0.5),
        (0.3, (6, 5, 8), 0.6, 1.2),
    ],
)
def test_annealed_noise_is_cads_for_each_sample(psi, shape, tau1, tau2):
    y, n = embedding_and_noise(*shape)
    y[2] = y[2] * 10 - 30  # one sample of another mean and std
    u = torch.tensor([1.0, 0.875, 0.7, 0.5, 0.3, 0.1])
    ours = annealed_noise(y, n, u, 0.25, tau1, tau2, psi)
    assert ours.shape == y.shape and ours.dtype == y.dtype
    for i in range(6):
        own, noise = y[i].double().numpy(), n[i].double().numpy()
        expected = plain_cads(own, noise, u[i].item(), 0.25, tau1, tau2, psi)
        np.testing.assert_allclose(ours[i].numpy(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("psi", [0.0, 1.0])
def test_identity_bit_for_bit_up_to_tau1(psi):
    y, n = embedding_and_noise(4, 5, 8)
    for u in (0.0, 0.6, torch.tensor([0.6, 0.125, 0.0, 0.5999])):
        assert torch.equal(annealed_noise(y, n, u, 0.25, 0.6, 0.9, psi), y)
    # Also in a batch whose other samples are noised.
    mixed = annealed_noise(y, n, torch.tensor([0.5, 0.7, 0.6, 1.0]), 0.25, 0.6, 0.9, psi)
    assert torch.equal(mixed[0], y[0]) and torch.equal(mixed[2], y[2])
    assert (mixed[1] != y[1]).any() and (mixed[3] != y[3]).any()


def test_nothing_but_noise_from_tau2_on():
    y, n = embedding_and_noise(4, 5, 8)
    other, _ = embedding_and_noise(4, 5, 8, seed=1)
    for u in (0.9, 1.0):
        noised = annealed_noise(y, n, u, 0.25, 0.6, 0.9, psi=0.0)
        torch.testing.assert_close(noised, 0.25 * n, atol=1e-6, rtol=1e-6)
    before = annealed_noise(y, n, 0.89, 0.25, 0.6, 0.9, psi=0.0)
    other_before = annealed_noise(other, n, 0.89, 0.25, 0.6, 0.9, psi=0.0)
    assert (before - other_before).abs().max() > 0.1


@pytest.mark.parametrize("u", [0.7, 1.0])
def test_psi_1_keeps_mean_and_std_and_psi_0_does_not(u):
    y, n = embedding_and_noise(4, 40)
    kept = annealed_noise(y, n, u, 0.25, 0.6, 0.9, psi=1.0)
    raw = annealed_noise(y, n, u, 0.25, 0.6, 0.9, psi=0.0)
    torch.testing.assert_close(kept.mean(1), y.mean(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kept.std(1), y.std(1), atol=1e-5, rtol=1e-5)
    assert (raw.std(1) / y.std(1) < 0.9).all()


def test_a_sample_does_not_depend_on_its_batch():
    y, n = embedding_and_noise(5, 3, 8)
    u = torch.tensor([1.0, 0.8, 0.7, 0.65, 0.5])
    whole = annealed_noise(y, n, u, 0.25, 0.6, 0.9, 0.7)
    for i in range(5):
        one = slice(i, i + 1)
        alone = annealed_noise(y[one], n[one], u[one], 0.25, 0.6, 0.9, 0.7)
        torch.testing.assert_close(alone, whole[one], atol=1e-6, rtol=1e-6)
    y[0] = 1e4  # the neighbours do not see it
    assert torch.equal(annealed_noise(y, n, u, 0.25, 0.6, 0.9, 0.7)[1:], whole[1:])


def test_a_constant_embedding_stays_finite():
    y, n = torch.ones(2, 4), torch.zeros(2, 4)
    assert annealed_noise(y, n, 0.8, 0.25, 0.6, 0.9).isfinite().all()


def test_a_noised_prompt_has_one_noise_a_rollout_for_each_embedding():
    tokens, tokens_noise = embedding_and_noise(4, 5, 8)
    pooled, pooled_noise = embedding_and_noise(4, 6, seed=1)
    condition = noised_prompt((tokens, pooled), (tokens_noise, pooled_noise), 0.25, 0.6, 0.9, 0.7)
    rows, u = torch.tensor([3, 0]), torch.tensor([0.8, 0.7])
    noised_tokens, noised_pooled = condition(rows, u)
    expected = annealed_noise(tokens[rows], tokens_noise[rows], u, 0.25, 0.6, 0.9, 0.7)
    assert torch.equal(noised_tokens, expected)
    expected = annealed_noise(pooled[rows], pooled_noise[rows], u, 0.25, 0.6, 0.9, 0.7)
    assert torch.equal(noised_pooled, expected)


def test_scale_0_is_the_clean_prompt():
    tokens, noise = embedding_and_noise(4, 5, 8)
    condition = noised_prompt((tokens,), (noise,), 0, 0.6, 0.9)
    (clean,) = condition(torch.tensor([2, 1]), torch.tensor([1.0, 1.0]))
    assert torch.equal(clean, tokens[[2, 1]])
