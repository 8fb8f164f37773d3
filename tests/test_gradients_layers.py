"""Each layer type: a recorded row equals the sketch of torch.func's per-sample gradient."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import per_sample_gradients
from torch import nn

import whence

DIM = 1024


def recorded(tmp_path, model, loss, *batch, **options):
    """Rows of one batch, at full precision."""
    count = len(batch[0])
    with (
        whence.record(model, tmp_path / "store", dim=DIM, dtype="float32", **options) as rec,
        rec.batch(list(range(count))) as done,
    ):
        loss(model, *batch).backward()
    return done.rows


def assert_equals_oracle(tmp_path, model, loss, *batch, scale=1.0, **options):
    rows = recorded(tmp_path, model, loss, *batch, **options)
    exact = whence.Sketch("chunked_sjlt", dim=DIM)(per_sample_gradients(model, loss, *batch))
    error = np.linalg.norm(rows - scale * exact, axis=1) / np.linalg.norm(scale * exact, axis=1)
    assert error.max() < 1e-5


def squares(model, x):
    """A loss that is the mean over examples of a sum of uneven squares."""
    out = model(x).flatten(1)
    weights = torch.linspace(0.5, 1.5, out.shape[1])
    return (out.square() * weights).sum(1).mean()


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 4, 3, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Linear(4 * 9, 5)

    def forward(self, x):
        x = self.relu(self.first(x))
        x = self.relu(self.second(x))
        return self.last(x.flatten(1))


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 7)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Table(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table = nn.Embedding(11, 5, **options)

    def forward(self, x):
        return self.table(x).sin()


class Attention(nn.Module):
    def __init__(self, form, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.form = form

    def forward(self, x):
        other = x.flip(1) * 0.5
        arguments = {
            "self": (x, x, x),
            "cross": (x, other, other),
            "three": (x, other, other + 1),
        }[self.form]
        return self.attention(*arguments, need_weights=self.form == "three")[0]


CASES = {
    "linear": (nn.Linear(6, 5), (4, 6)),
    "linear without bias": (nn.Linear(6, 5, bias=False), (4, 6)),
    "linear over positions": (nn.Linear(6, 5), (4, 3, 6)),
    "linear over two dimensions of positions": (nn.Linear(6, 5), (4, 3, 2, 6)),
    "wide linear": (nn.Linear(130, 33), (3, 17, 130)),
    "conv1d": (nn.Conv1d(3, 4, 3, padding=1), (4, 3, 9)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2)), (4, 3, 7, 6)),
    "conv2d strided, dilated, grouped": (
        nn.Conv2d(4, 6, 3, stride=2, dilation=2, groups=2, padding=(2, 1)),
        (3, 4, 9, 8),
    ),
    "conv2d depthwise": (nn.Conv2d(4, 4, 3, groups=4), (3, 4, 6, 6)),
    "conv2d same": (nn.Conv2d(2, 3, 4, padding="same"), (3, 2, 6, 7)),
    "conv2d circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (3, 2, 6, 6)),
    "conv2d reflect": (nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"), (3, 2, 6, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (3, 2, 4, 5, 3)),
    "layer norm": (nn.LayerNorm(6), (4, 3, 6)),
    "layer norm over two dimensions": (nn.LayerNorm((3, 6)), (4, 3, 6)),
    "layer norm without bias": (nn.LayerNorm(6, bias=False), (4, 6)),
    "rms norm": (nn.RMSNorm(6), (4, 3, 6)),
    "group norm": (nn.GroupNorm(2, 6), (4, 6, 3, 2)),
    "batch norm in evaluation": (nn.BatchNorm2d(3).eval(), (4, 3, 5, 5)),
    "called twice": (CalledTwice(), (4, 7)),
    "in place": (InPlace(), (4, 2, 8, 8)),
    "attention": (Attention("self"), (4, 5, 8)),
    "attention without bias": (Attention("self", bias=False), (4, 5, 8)),
    "attention to another sequence": (Attention("cross"), (4, 5, 8)),
    "attention with three inputs": (Attention("three"), (4, 5, 8)),
    "attention of other widths": (Attention("three", kdim=8, vdim=8), (4, 5, 8)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("weight_gradients", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_row_is_the_sketch_of_the_exact_gradient(tmp_path, name, weight_gradients):
    model, shape = CASES[name]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(shape)
    assert_equals_oracle(tmp_path, model, squares, x, weight_gradients=weight_gradients)


def test_attention_with_other_key_and_value_widths(tmp_path):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=3, batch_first=True)

        def forward(self, x):
            return self.attention(x, x[..., :6], x[..., :3])[0]

    assert_equals_oracle(tmp_path, Wide(), squares, torch.randn(3, 5, 8))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"sparse": True}])
def test_embedding(tmp_path, options):
    x = torch.randint(0, 11, (5, 8))
    x[0] = 0
    model = Table(**options)
    if options.get("sparse"):
        dense = Table()
        dense.load_state_dict(model.state_dict())
        rows = recorded(tmp_path / "sparse", model, squares, x)
        assert np.array_equal(rows, recorded(tmp_path / "dense", dense, squares, x))
    elif options:
        rows = recorded(tmp_path, model, squares, x)
        gradients = per_sample_gradients(model, squares, x)
        gradients["table.weight"][:, 0] = 0  # torch.func does not know padding_idx
        exact = whence.Sketch(dim=DIM)(gradients)
        assert np.abs(rows - exact).max() < 1e-5 * np.abs(exact).max()
    else:
        assert_equals_oracle(tmp_path, model, squares, x)


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=lambda o: next(iter(o))
)
def test_embeddings_that_mix_examples_are_refused(tmp_path, options):
    with pytest.raises(whence.errors.LayerError, match=next(iter(options))):
        recorded(tmp_path, Table(**options), squares, torch.randint(0, 11, (5, 8)))


class TinyTransformer(nn.Module):
    """Character transformer: positions by arange, tied head."""

    def __init__(self, tie=True):
        super().__init__()
        self.token = nn.Embedding(13, 8)
        self.position = nn.Embedding(6, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 13, bias=False)
        if tie:
            self.head.weight = self.token.weight

    def forward(self, x):
        h = self.token(x) + self.position(torch.arange(x.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.block(h, src_mask=mask))


def token_loss(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


@pytest.mark.parametrize("tie", [True, False])
def test_a_char_transformer_with_positions_and_tied_head(tmp_path, tie):
    x, y = torch.randint(0, 13, (4, 6)), torch.randint(0, 13, (4, 6))
    assert_equals_oracle(tmp_path, TinyTransformer(tie), token_loss, x, y)


def test_a_tied_parameter_goes_by_its_first_name(tmp_path):
    x, y = torch.randint(0, 13, (4, 6)), torch.randint(0, 13, (4, 6))
    model = TinyTransformer()
    recorded(tmp_path, model, token_loss, x, y)
    parameters = whence.open(tmp_path / "store").manifest.model["parameters"]
    tied = next(each for each in parameters if each["name"] == "head.weight")
    assert tied["places"] == ["head.weight", "token.weight"]
    assert "token.weight" not in {each["name"] for each in parameters}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weight_gradients", [True, False])
def test_transformer_encoder(tmp_path, training, weight_gradients):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    x = torch.randn(4, 5, 8)
    assert_equals_oracle(tmp_path, model, squares, x, weight_gradients=weight_gradients)


def test_a_small_cnn_and_an_mlp(tmp_path):
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(30, 20), nn.ReLU(inplace=True), nn.Linear(20, 4))
    x, y = torch.randn(8, 30), torch.randint(0, 4, (8,))
    assert_equals_oracle(tmp_path / "mlp", mlp, lambda m, x, y: F.cross_entropy(m(x), y), x, y)
    cnn, x, y = InPlace(), torch.randn(6, 2, 8, 8), torch.randint(0, 5, (6,))
    assert_equals_oracle(tmp_path / "cnn", cnn, lambda m, x, y: F.cross_entropy(m(x), y), x, y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tiny_gpt2(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=17,
        n_positions=8,
        n_embd=8,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    x = torch.randint(0, 17, (4, 8))

    def loss(model, x):
        logits = model(x).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())

    assert_equals_oracle(tmp_path, model, loss, x)


REDUCTIONS = {
    "mean": lambda m, x, y: F.cross_entropy(m(x), y),
    "sum": lambda m, x, y: F.cross_entropy(m(x), y, reduction="sum"),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_reduction_gives_the_gradient_of_the_own_loss(tmp_path, reduction):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(7, 6), torch.randint(0, 3, (7,))
    assert_equals_oracle(tmp_path, model, REDUCTIONS[reduction], x, y, reduction=reduction)


def test_token_mean_gives_the_sum_over_own_tokens(tmp_path):
    model = TinyTransformer()
    x, y = torch.randint(0, 13, (4, 6)), torch.randint(0, 13, (4, 6))
    y[0, 2:] = -100
    y[1, 5:] = -100
    counts = (y != -100).sum(1)
    with (
        whence.record(
            model, tmp_path / "s", dim=DIM, reduction="token_mean", dtype="float32"
        ) as rec,
        rec.batch([0, 1, 2, 3], tokens=counts) as done,
    ):
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()

    def own(model, x, y):
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")

    exact = whence.Sketch(dim=DIM)(per_sample_gradients(model, own, x, y))
    assert np.linalg.norm(done.rows - exact) < 1e-5 * np.linalg.norm(exact)


def test_scale_takes_out_accumulation_and_loss_scaling(tmp_path):
    model = nn.Linear(6, 3)
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    with whence.record(model, tmp_path / "s", dim=DIM, dtype="float32") as rec:
        for half in (slice(0, 4), slice(4, 8)):
            with rec.batch(list(range(8))[half], scale=0.5 * 1024):
                (F.cross_entropy(model(x[half]), y[half]) * 0.5 * 1024).backward()
    rows = whence.open(tmp_path / "s").rows()
    exact = whence.Sketch(dim=DIM)(per_sample_gradients(model, REDUCTIONS["mean"], x, y))
    assert np.linalg.norm(rows - exact) < 1e-5 * np.linalg.norm(exact)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("weight_gradients", [True, False])
def test_gradient_checkpointing(tmp_path, reentrant, weight_gradients):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))
            self.on = True

        def forward(self, x):
            x = torch.tanh(self.first(x))
            if self.on:
                return checkpoint(self.inner, x, use_reentrant=reentrant)
            return self.inner(x)

    model, x = Checkpointed(), torch.randn(5, 6)
    rows = recorded(tmp_path, model, squares, x, weight_gradients=weight_gradients)
    model.on = False
    exact = whence.Sketch(dim=DIM)(per_sample_gradients(model, squares, x))
    assert np.linalg.norm(rows - exact) < 1e-5 * np.linalg.norm(exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_as_autocast_does(tmp_path, dtype):
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4))
    x, y = torch.randn(6, 32), torch.randint(0, 4, (6,))

    def loss(model, x, y):
        with torch.autocast("cpu", dtype):
            out = model(x)
        return F.cross_entropy(out.float(), y)

    rows = recorded(tmp_path, model, loss, x, y)
    gradients = []
    for i in range(6):
        model.zero_grad()
        loss(model, x[i : i + 1], y[i : i + 1]).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    stacked = {n: torch.stack([g[n] for g in gradients]) for n in gradients[0]}
    exact = whence.Sketch(dim=DIM)(stacked)
    # The oracle's own weight gradients are rounded to 8 or 11 bits; ours are summed in float32.
    assert np.linalg.norm(rows - exact) < 2e-2 * np.linalg.norm(exact)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("weight_gradients", [True, False])
def test_a_compiled_model(tmp_path, weight_gradients):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    compiled = torch.compile(model, backend="aot_eager")
    x, y = torch.randn(5, 6), torch.randint(0, 3, (5,))
    loss = REDUCTIONS["mean"]
    loss(compiled, x, y).backward()  # compiled before any hook is there
    rows = recorded(tmp_path, compiled, loss, x, y, weight_gradients=weight_gradients)
    exact = whence.Sketch(dim=DIM)(per_sample_gradients(model, loss, x, y))
    assert np.linalg.norm(rows - exact) < 1e-5 * np.linalg.norm(exact)


def test_frozen_parameters_are_left_out(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].weight.requires_grad_(False)
    assert_equals_oracle(tmp_path, model, squares, torch.randn(4, 6))


def test_lora_comes_as_linear(tmp_path):
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(6, 5).requires_grad_(False)
            self.a = nn.Linear(6, 2, bias=False)
            self.b = nn.Linear(2, 5, bias=False)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    assert_equals_oracle(tmp_path, Lora(), squares, torch.randn(4, 6))


def test_a_registered_layer(tmp_path):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6))

        def forward(self, x):
            return x * self.weight

    @whence.register_layer(Scale)
    def scale(module, inputs, output_gradient):
        return {"weight": (output_gradient * inputs[0]).sum(1)}

    model = nn.Sequential(nn.Linear(4, 6), Scale())
    assert_equals_oracle(tmp_path, model, squares, torch.randn(4, 3, 4))


class Loose(nn.Module):
    """Owns a parameter that no layer accounts for."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.inner(x).sin() * self.gain


@pytest.mark.parametrize("weight_gradients", [True, False])
def test_functional_covers_any_module(tmp_path, weight_gradients):
    model = nn.Sequential(nn.Linear(3, 4), Loose(), nn.Linear(4, 2))
    options = {"uncovered": "functional", "weight_gradients": weight_gradients}
    assert_equals_oracle(tmp_path, model, squares, torch.randn(5, 3), **options)


@pytest.mark.parametrize("weight_gradients", [True, False])
def test_functional_beside_positions(tmp_path, weight_gradients):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.position = nn.Embedding(7, 4), nn.Embedding(9, 4)
            self.loose = Loose()

        def forward(self, x):
            return self.loose(self.token(x) + self.position(torch.arange(x.shape[1])))

    options = {"uncovered": "functional", "weight_gradients": weight_gradients}
    assert_equals_oracle(tmp_path, Model(), squares, torch.randint(0, 7, (5, 6)), **options)


def test_functional_refuses_active_dropout(tmp_path):
    class Noisy(Loose):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, x):
            return self.dropout(super().forward(x))

    with pytest.raises(whence.errors.LayerError, match="dropout"):
        recorded(tmp_path, Noisy(), squares, torch.randn(5, 4), uncovered="functional")
