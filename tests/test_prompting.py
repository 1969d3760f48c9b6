"""Prompt files, the order of the prompts, and the annealed noise on their embeddings."""
import numpy as np
import pytest
import torch

from prompting import Prompt, annealed_noise, draw_prompts, read_prompts


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Files.

@pytest.mark.parametrize("content", [
    "a dark coat\nein weißer Schuh\n", "a dark coat\nein weißer Schuh", "a dark coat\r\nein weißer Schuh\r\n",
    "\ufeffa dark coat\nein weißer Schuh\n", "  a dark coat \n\tein weißer Schuh\n",
], ids=["plain", "no last newline", "CRLF", "BOM", "spaces"])
def test_text_files(tmp_path, content):
    assert read_prompts(write(tmp_path, "p.txt", content)) == [Prompt("a dark coat", {}), Prompt("ein weißer Schuh", {})]


@pytest.mark.parametrize("end, start", [("\n", ""), ("\r\n", ""), ("\n", "\ufeff")], ids=["plain", "CRLF", "BOM"])
def test_json_lines_keep_their_metadata(tmp_path, end, start):
    lines = ['{"prompt": " a dark coat ", "label": 4, "tags": ["x", {"y": null}]}', '{"label": 0, "prompt": "wei\\u00df"}',
             '{"prompt": "a bag"}']
    prompts = read_prompts(str(write(tmp_path, "p.jsonl", start + end.join(lines) + end)))
    assert prompts == [Prompt("a dark coat", {"label": 4, "tags": ["x", {"y": None}]}), Prompt("weiß", {"label": 0}), Prompt("a bag", {})]


def test_equal_lines_stay_apart(tmp_path):
    assert [p.text for p in read_prompts(write(tmp_path, "p.txt", "a\nb\na\n"))] == ["a", "b", "a"]


GOOD = '{"prompt": "a coat"}\n'


@pytest.mark.parametrize("name, content, line, words", [
    ("p.txt", "a coat\n\na bag\n", 2, "empty prompt"),
    ("p.txt", "a coat\na bag\n   \n", 3, "empty prompt"),
    ("p.txt", "\r\na coat\r\n", 1, "empty prompt"),
    ("p.jsonl", GOOD + "\n" + GOOD, 2, "empty prompt"),
    ("p.jsonl", GOOD + GOOD + '{"prompt": "  "}\n', 3, "empty prompt"),
    ("p.jsonl", GOOD + '{"prompt": "a bag"\n', 2, "not JSON"),
    ("p.jsonl", "a coat\n", 1, "not JSON"),
    ("p.jsonl", GOOD + '{"text": "a bag"}\n', 2, '"prompt"'),
    ("p.jsonl", GOOD + '{"prompt": 3}\n', 2, '"prompt"'),
    ("p.jsonl", GOOD + '{"prompt": null}\n', 2, '"prompt"'),
    ("p.jsonl", GOOD + '["a bag"]\n', 2, "object"),
    ("p.jsonl", '"a bag"\n', 1, "object"),
    ("p.jsonl", GOOD + "3\n", 2, "object"),
])
def test_a_bad_line_is_named(tmp_path, name, content, line, words):
    with pytest.raises(ValueError) as caught:
        read_prompts(write(tmp_path, name, content))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}:{line}: ") and words in message and "\n" not in message


@pytest.mark.parametrize("name, content, words", [
    ("p.txt", "", "no prompts"), ("p.jsonl", "", "no prompts"), ("p.txt", "\ufeff", "no prompts"),
    ("p.txt", b"a coat\nein wei\xdfer Schuh\n", "UTF-8"), ("p.jsonl", b'{"prompt": "wei\xdf"}\n', "UTF-8"),
    ("p.txt", "a coat".encode("utf-16"), "UTF-8"),
    ("p.csv", "a coat\n", ".jsonl"), ("p", "a coat\n", ".jsonl"), ("p.json", '{"prompt": "a"}', ".jsonl"),
])
def test_a_bad_file_is_named(tmp_path, name, content, words):
    with pytest.raises(ValueError) as caught:
        read_prompts(write(tmp_path, name, content))
    assert str(tmp_path / name) in str(caught.value) and words in str(caught.value)


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    for name in ("absent.txt", "absent.jsonl", "folder.txt"):
        with pytest.raises(ValueError, match=name):
            read_prompts(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------------
# Order.

@pytest.mark.parametrize("total, count", [(10, 10), (10, 3), (7, 5), (12, 4), (3, 8), (1, 4), (30, 10)])
def test_each_prompt_once_a_pass(total, count):
    steps = 2 * total                                                    # ends on a whole number of passes
    drawn = np.concatenate([draw_prompts(total, count, seed=5, step=step) for step in range(steps)])
    assert drawn.shape == (steps * count,)
    for one_pass in drawn.reshape(-1, total):
        assert sorted(one_pass) == list(range(total))


def test_passes_are_shuffled_anew():
    passes = [tuple(draw_prompts(20, 20, seed=0, step=step)) for step in range(6)]
    assert len(set(passes)) == 6 and tuple(range(20)) not in passes
    assert tuple(draw_prompts(20, 20, seed=1, step=0)) not in passes


def test_a_draw_is_a_function_of_seed_and_step():
    """Whatever was drawn before: a resumed run, or another process, goes on with the same prompts."""
    in_order = [draw_prompts(13, 5, 3, step) for step in range(9)]
    np.random.seed(1)
    for step in (8, 2, 2, 0, 5):
        assert (draw_prompts(13, 5, 3, step) == in_order[step]).all()
    assert any((draw_prompts(13, 5, 4, step) != in_order[step]).any() for step in range(9))


# ---------------------------------------------------------------------------------------------------------------------
# Annealed noise.

def naive_cads(y, n, u, s, tau1, tau2, psi):
    """CADS (arXiv 2310.17347) for one sample, in numpy."""
    gamma = 1.0 if u <= tau1 else 0.0 if u >= tau2 else (tau2 - u) / (tau2 - tau1)
    noised = np.sqrt(gamma) * y + s * np.sqrt(1 - gamma) * n
    rescaled = (noised - noised.mean()) / noised.std(ddof=1) * y.std(ddof=1) + y.mean()
    return psi * rescaled + (1 - psi) * noised


def embedding(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return 0.5 + 2 * torch.randn(shape, generator=g), torch.randn(shape, generator=g)


@pytest.mark.parametrize("psi", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(6, 5, 8), (6, 12)])
@pytest.mark.parametrize("tau1, tau2", [(0.6, 0.9), (0.2, 1.2), (0.0, 0.5)])
def test_annealed_noise_is_cads_for_each_sample(psi, shape, tau1, tau2):
    y, n = embedding(*shape)
    y[2] = y[2] * 10 - 30                                                # one sample of another mean and std
    u = torch.tensor([1.0, 0.875, 0.7, 0.5, 0.3, 0.1])
    ours = annealed_noise(y, n, u, 0.25, tau1, tau2, psi)
    assert ours.shape == y.shape and ours.dtype == y.dtype
    for i in range(6):
        expected = naive_cads(y[i].double().numpy(), n[i].double().numpy(), u[i].item(), 0.25, tau1, tau2, psi)
        np.testing.assert_allclose(ours[i].numpy(), expected, atol=2e-5, rtol=2e-5)


def test_identity_bit_for_bit_up_to_tau1():
    y, n = embedding(4, 5, 8)
    for u in (0.0, 0.3, 0.6, torch.tensor([0.6, 0.125, 0.0, 0.5999])):
        for psi in (0.0, 1.0):
            assert torch.equal(annealed_noise(y, n, u, 0.25, 0.6, 0.9, psi), y)
    mixed = annealed_noise(y, n, torch.tensor([0.5, 0.7, 0.6, 1.0]), 0.25, 0.6, 0.9)
    assert torch.equal(mixed[0], y[0]) and torch.equal(mixed[2], y[2])   # in a batch whose others are noised
    assert (mixed[1] != y[1]).any() and (mixed[3] != y[3]).any()


def test_all_noise_from_tau2_on():
    (y, n), (other, _) = embedding(4, 5, 8), embedding(4, 5, 8, seed=1)
    for u in (0.9, 0.95, 1.0):
        torch.testing.assert_close(annealed_noise(y, n, u, 0.25, 0.6, 0.9, psi=0.0), 0.25 * n, atol=1e-6, rtol=1e-6)
    assert (annealed_noise(y, n, 0.89, 0.25, 0.6, 0.9, psi=0.0) - annealed_noise(other, n, 0.89, 0.25, 0.6, 0.9, psi=0.0)).abs().max() > 0.1


def test_psi_1_keeps_mean_and_std_and_psi_0_does_not():
    y, n = embedding(4, 5, 8)
    for u in (0.7, 0.8, 1.0):
        kept, raw = (annealed_noise(y, n, u, 0.25, 0.6, 0.9, psi).flatten(1) for psi in (1.0, 0.0))
        torch.testing.assert_close(kept.mean(1), y.flatten(1).mean(1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(kept.std(1), y.flatten(1).std(1), atol=1e-5, rtol=1e-5)
        assert (raw.std(1) / y.flatten(1).std(1) < 0.9).all()


def test_a_sample_does_not_depend_on_its_batch():
    y, n = embedding(5, 3, 8)
    u = torch.tensor([1.0, 0.8, 0.7, 0.65, 0.5])
    whole = annealed_noise(y, n, u, 0.25, 0.6, 0.9, 0.7)
    for i in range(5):
        alone = annealed_noise(y[i:i + 1], n[i:i + 1], u[i:i + 1], 0.25, 0.6, 0.9, 0.7)
        torch.testing.assert_close(alone, whole[i:i + 1], atol=1e-6, rtol=1e-6)
    y[0] = 1e4                                                           # the neighbours do not see it
    assert torch.equal(annealed_noise(y, n, u, 0.25, 0.6, 0.9, 0.7)[1:], whole[1:])


def test_one_fraction_for_all_is_the_same_as_one_each():
    y, n = embedding(4, 5, 8)
    for u in (1.0, 0.75, 0.6):
        one_each = torch.full((4,), u, dtype=torch.float64)
        assert torch.equal(annealed_noise(y, n, u, 0.25, 0.6, 0.9), annealed_noise(y, n, one_each, 0.25, 0.6, 0.9))


def test_a_constant_embedding_stays_finite():
    y, n = torch.ones(2, 4), torch.zeros(2, 4)
    assert annealed_noise(y, n, 0.8, 0.25, 0.6, 0.9).isfinite().all()


@pytest.mark.parametrize("separator", ["\u2028", "\x0b", "\x85"])
def test_only_line_feeds_end_a_line(tmp_path, separator):
    text = f"a coat{separator}of wool"
    assert [p.text for p in read_prompts(write(tmp_path, "a.txt", text.encode()))] == [text]
