"""Scores of folders that trak and bergson themselves have written, beside what they compute.

Each is skipped where its library is not installed. They run on the processor, on small models of
random weights and data; `-s` prints the largest difference, as a share of the largest score.
"""

import shutil

import numpy as np
import pytest
import torch

import whence

pytestmark = pytest.mark.filterwarnings("ignore")


def difference(found, expected):
    assert found.shape == expected.shape
    return float(np.abs(found - expected.astype(np.float64)).max() / np.abs(expected).max())


EXAMPLES, TARGETS = 300, 17


def traked(path, half):
    """A `save_dir` of three trained models, and the `TRAKer` that has filled it."""
    trak = pytest.importorskip("trak")
    dtype = torch.float16 if half else torch.float32
    torch.manual_seed(0)
    x = torch.randn(EXAMPLES + TARGETS, 12)
    y = (x @ torch.randn(12, 4) + 2 * torch.randn(len(x), 4)).argmax(1)
    x, y, asked = x[:EXAMPLES], y[:EXAMPLES], (x[EXAMPLES:].to(dtype), y[EXAMPLES:])
    states = []
    for _ in range(3):
        model = torch.nn.Sequential(
            torch.nn.Linear(12, 24), torch.nn.ReLU(), torch.nn.Linear(24, 4)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        states.append({name: value.to(dtype) for name, value in model.state_dict().items()})
    traker = trak.TRAKer(
        model.to(dtype),
        "image_classification",
        EXAMPLES,
        save_dir=str(path),
        device="cpu",
        proj_dim=32,
        use_half_precision=half,
        lambda_reg=0.01,
    )
    for number, state in enumerate(states):
        traker.load_checkpoint(state, model_id=number)
        traker.featurize((x.to(dtype), y), num_samples=EXAMPLES)
    traker.finalize_features()
    for number, state in enumerate(states):
        traker.start_scoring_checkpoint("test", state, model_id=number, num_targets=TARGETS)
        traker.score(asked, num_samples=TARGETS)
    return traker


@pytest.mark.parametrize(("half", "allowed"), [(False, 2e-6), (True, 2e-3)])
def test_trak(tmp_path, half, allowed):
    traker = traked(tmp_path / "t", half)
    for models in (None, [1], [0, 2]):
        expected = np.array(traker.finalize_scores("test", model_ids=models))
        found = whence.interop.from_trak(tmp_path / "t", model_ids=models)
        assert found.saved_scores("test").tobytes() == expected.astype(np.float32).tobytes()
        apart = difference(found.scores(found.queries("test")), expected)
        print(f"trak, {expected.dtype}, models {models}: {apart:.1e}")
        assert apart < allowed


MODULES = [f"layers.{layer}.mlp.dense_h_to_4h" for layer in (0, 1)]


def collected(path, dtype, tokens):
    """An index, a query index and two Hessians of a small language model."""
    bergson = pytest.importorskip("bergson", exc_type=ImportError)
    from bergson.collector.collector import CollectorComputer
    from bergson.config import IndexConfig
    from bergson.data import allocate_batches
    from bergson.hessians.autocorrelation import (
        AutocorrelationCollector,
        JointAutocorrelationCollector,
    )
    from bergson.utils.worker_utils import create_processor
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    generator = np.random.default_rng(0)

    def texts(count):
        ids = [generator.integers(0, 64, generator.integers(5, 12)).tolist() for _ in range(count)]
        lengths = [len(text) for text in ids]
        return Dataset.from_dict({"input_ids": ids, "labels": ids, "length": lengths})

    def settings(name, tokens=False):
        return IndexConfig(
            run_path=str(path / name),
            token_batch_size=256,
            projection_dim=4,
            attribute_tokens=tokens,
        )

    train = texts(60)
    for name, data in (("index", train), ("query", texts(5))):
        cfg = settings(name, tokens and name == "index")
        bergson.collect_gradients(
            model=model,
            data=data,
            processor=create_processor(model, cfg, None),
            cfg=cfg,
            batches=allocate_batches(data["length"][:], 256),
        )
        shutil.move(cfg.partial_run_path, path / name)
    kinds = {"modules": AutocorrelationCollector, "joint": JointAutocorrelationCollector}
    for name, collector in kinds.items():
        cfg = settings(name)
        cfg.partial_run_path.mkdir(parents=True)
        CollectorComputer(
            model=model,
            data=train,
            collector=collector(
                model=model.base_model,
                data=train,
                path=str(path / name),
                processor=create_processor(model, cfg, None),
            ),
            batches=allocate_batches(train["length"][:], 256),
            cfg=cfg,
        ).run_with_collector_hooks(desc=name)


@pytest.mark.parametrize(
    ("dtype", "tokens"),
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.float16, False),
    ],
)
def test_bergson(tmp_path, dtype, tokens):
    collected(tmp_path, dtype, tokens)
    from bergson import Attributor
    from bergson.data import load_module_gradients
    from bergson.utils.utils import numpy_to_tensor

    stored = load_module_gradients(tmp_path / "query")
    asked = {name: numpy_to_tensor(np.ascontiguousarray(stored[name])).float() for name in stored}
    for hessian in (None, "modules", "joint"):
        for unit_norm in (False, True):
            for modules in (None, MODULES):
                path = None if hessian is None else tmp_path / hessian
                peer = Attributor(tmp_path / "index", unit_norm=unit_norm, hessian_path=path)
                queries = {name: rows.clone() for name, rows in asked.items()}
                scores, places = peer.search(queries, None, modules and set(modules))
                expected = np.empty((peer.N, len(scores)), np.float32)
                np.put_along_axis(expected, places.numpy().T, scores.numpy().T, axis=0)
                index = whence.interop.from_bergson(
                    tmp_path / "index", unit_norm=unit_norm, hessian=path, modules=modules
                )
                apart = difference(index.scores(index.queries(tmp_path / "query")), expected)
                print(f"bergson, {dtype}, {hessian}, unit norm {unit_norm}, {modules}: {apart:.1e}")
                assert apart < 1e-5
