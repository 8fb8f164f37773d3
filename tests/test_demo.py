"""The demo finds flipped labels among real digits, says how well, and can be run again."""

import contextlib
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import whence
from whence import cli, demo


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One run: its folder and what it printed; checked not to touch torch's random state."""
    out = tmp_path_factory.mktemp("demo") / "out"
    before, threads, printed = torch.get_rng_state(), torch.get_num_threads(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = cli.main(["demo", "--out", str(out)])
    assert status == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    return out, printed.getvalue()


@pytest.fixture(scope="module")
def results(done):
    return json.loads((done[0] / "demo.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(done):
    return (done[0] / "index.html").read_text(encoding="utf-8")


def test_the_store_opens_and_holds_every_training_digit(done):
    store = whence.open(done[0] / "store")
    assert len(store) == 1400
    assert store.checkpoints == [f"epoch {epoch}" for epoch in (2, 4, 6, 8, 10)]


def test_a_tenth_of_the_stored_labels_is_flipped_and_the_rest_is_true(done):
    store = whence.open(done[0] / "store")
    truth = load_digits().target[store.ids]
    np.testing.assert_array_equal(store.columns["shows"], truth)
    assert (store.columns["label"] != truth).sum() == 140


def test_self_influence_finds_flipped_labels_far_above_chance(done, results):
    # A second way: the scores as stored, the truth as scikit-learn has it, and its own AUC.
    store = whence.open(done[0] / "preconditioned")
    wrong = store.columns["label"] != load_digits().target[store.ids]
    influence = store.self_influence()
    found = results["rankings"][demo.SELF]
    assert found["auc"] == pytest.approx(roc_auc_score(wrong, influence), abs=1e-12)
    assert found["auc"] > 0.9
    assert found["share_found"] == wrong[np.argsort(-influence)[:140]].sum() / 140
    assert found["share_found"] > 0.7


def test_every_ranking_stands_beside_the_plain_loss(results):
    plain = [demo.PLAIN_SELF, demo.PLAIN_TEST]
    names = [demo.SELF, demo.TEST, demo.ERRORS, *plain, demo.PATH_LOSS, demo.LOSS]
    assert list(results["rankings"]) == names
    assert all(0 <= found["auc"] <= 1 for found in results["rankings"].values())


def test_what_is_printed_are_the_figures_of_the_file(done, results):
    _, printed = done
    for name, found in results["rankings"].items():
        (row,) = [line for line in printed.splitlines() if line.startswith(f"  {name} ")]
        assert row.split()[-2:] == [f"{found['auc']:.4f}", f"{found['share_found']:.1%}"]
    for meaning in (results["sign"], results["method"], results["unit"], results["page"]):
        assert meaning in printed
    assert printed.isascii()


def test_the_page_and_the_file_have_the_same_figures(page, results):
    rows = re.findall(r'<th scope="row">([^<]*)</th><td[^>]*>([^<]*)</td><td[^>]*>([^<]*)', page)
    assert {name: (auc, found) for name, auc, found in rows if name != "chance"} == {
        name: (f"{found['auc']:.4f}", f"{found['share_found']:.1%}")
        for name, found in results["rankings"].items()
    }


def test_the_page_stands_alone_and_shows_images(page):
    elements = Elements(page).found
    addresses = [a[key] for _, a in elements for key in ("src", "href") if key in a]
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert not {"script", "link", "iframe"} & {name for name, _ in elements}
    assert "http://" not in page
    assert "https://" not in page
    images = [a for name, a in elements if name == "img"]
    assert len(images) == demo.SUSPECTS + 2 * demo.QUERIES * (1 + 2 * demo.SHOWN)
    assert sum(name == "polyline" for name, _ in elements) == len(demo.DRAWN)


def test_the_page_marks_exactly_the_flipped_digits_among_its_hits(done, page):
    store = whence.open(done[0] / "store")
    label = dict(zip(store.ids.tolist(), store.columns["label"].tolist(), strict=True))
    truth = load_digits().target
    cards = re.findall(r'<li class="card">(.*?)</li>', page)
    assert len(cards) == demo.SUSPECTS + 4 * demo.QUERIES * demo.SHOWN
    for card in cards:
        id_ = int(re.search(r"<bdi>id (\d+)</bdi>", card)[1])
        assert ('class="badge"' in card) == (label[id_] != truth[id_])


def test_the_shown_queries_are_test_digits_wrong_ones_first(done, results):
    stored = set(whence.open(done[0] / "store").ids.tolist())
    asked = results["queries"]
    assert not {answer["id"] for answer in asked} & stored
    wrong = [answer["shows"] != answer["predicted"] for answer in asked]
    assert wrong == [True] * 4 + [False] * 4
    assert len({answer["shows"] for answer in asked[4:]}) == 4


def test_queries_fall_back_to_high_losses_where_none_is_wrong():
    losses = np.array([0.1, 0.9, 0.2, 0.8, 0.7, 0.6, 0.3, 0.05])
    truth = np.array([1, 2, 3, 4, 5, 6, 1, 1])
    chosen = demo.choose(np.zeros(8, np.bool_), losses, truth)
    assert chosen.tolist() == [1, 3, 4, 5, 0, 2]


def test_a_second_run_replaces_the_first_and_gives_the_same_figures(done, results, page, capsys):
    out = done[0]
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    assert cli.main(["demo", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == results
    assert (out / "index.html").read_text(encoding="utf-8") == page
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"whence: --out must be a new or empty folder.*, got .*\n", printed.err)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_names_of_files_and_arguments_reach_the_terminal_as_text(tmp_path, capsys):
    path = tmp_path / "red\x1b[31m\n\u202ename"
    path.touch()
    assert cli.main(["demo", "--out", str(path)]) == 2
    assert capsys.readouterr().err == (
        rf"whence: --out must be a folder, got the file {tmp_path}/red\x1b[31m \u202ename" + "\n"
    )
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", "\x1b]0;title\x07"])
    assert r"unrecognized arguments: \x1b]0;title\x07" in capsys.readouterr().err


def test_a_terminal_without_a_character_gets_it_written_out(monkeypatch):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(demo, "run", lambda *_: {})
    monkeypatch.setattr(demo, "summary", lambda _: "naïve\nstore")
    assert cli.main(["demo"]) == 0
    assert file.buffer.getvalue() == b"na\\xefve\nstore\n"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"made_by": "someone"}', "\x00"])
def test_a_file_of_the_same_name_does_not_make_a_folder_a_demos(tmp_path, content):
    (tmp_path / "demo.json").write_text(content, encoding="utf-8")
    with pytest.raises(whence.errors.ArgumentError, match="an earlier demo's"):
        demo.prepare(tmp_path, 0)


def test_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(whence.errors.ArgumentError, match=r"^--out must be a folder, got the file"):
        demo.prepare(path, 0)


def test_the_folder_of_an_interrupted_demo_can_be_used_again(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train_and_record", interrupted)
    for _ in range(2):
        assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "whence: interrupted\n" * 2


@pytest.mark.parametrize(("module", "package"), [("torch", "torch"), ("sklearn", "scikit-learn")])
def test_a_missing_package_is_named_with_the_extra(tmp_path, module, package):
    code = f"import sys; sys.modules[{module!r}] = None\nfrom whence.cli import main\n"
    done = subprocess.run(
        [sys.executable, "-c", code + f"sys.exit(main(['demo', '--out', {str(tmp_path)!r}]))"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"whence: the demo needs {package}: pip install 'whence[demo]'\n"
    assert list(tmp_path.iterdir()) == []


def test_the_module_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "whence", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"whence \d+\.\d+\.\d+\S*\n", done.stdout)


@pytest.mark.parametrize("seed", ["-1", "4294967296", "one"])
def test_a_seed_out_of_range_is_wrong_use(seed, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", "--seed", seed])
    assert "--seed" in capsys.readouterr().err


def test_the_network_has_the_size_that_its_width_is_chosen_for():
    assert sum(parameter.numel() for parameter in demo.network().parameters()) == 9930
