"""The calls of the public API that can be long, each with work for a few seconds.

Each function prepares its work in a folder and returns the call; `scale` multiplies the work.
"""

import json
from itertools import count, pairwise

import numpy as np
from filled import fill, manifest

import whence
from whence.store import Checkpoint, Writer

CALLS = {}


def long(prepare):
    """Enters a call under its name."""
    CALLS[prepare.__name__] = prepare
    return prepare


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def large(*shape):
    """As drawn, the same million values again and again: drawing gigabytes takes a minute."""
    values, some = np.empty(shape, np.float32), drawn(1 << 20)
    flat = values.reshape(-1)
    for first in range(0, len(flat), len(some)):
        flat[first : first + len(some)] = some[: len(flat) - first]
    return values


def new(folder):
    """Names of files that are not there yet."""
    return (folder / f"new-{number}" for number in count())


# Sketches


def sketching(kind, size, **options):
    def prepare(folder, scale):
        sketch = whence.Sketch(kind, dim=512, **options)
        gradients = {"w": large(4 * scale, size // 1024, 1024)}
        return lambda: sketch(gradients)

    prepare.__name__ = f"sketch_{kind}"
    return long(prepare)


for kind, size in {
    "chunked_sjlt": 1 << 27,
    "sjlt": 1 << 26,
    "rademacher": 1 << 22,
    "gaussian": 1 << 19,
    "srht": 1 << 26,
    "tensorsketch": 1 << 26,
    "kronecker": 1 << 26,
}.items():
    sketching(kind, size)


@long
def sketch_of_one_row(folder, scale):
    gradient = large(1, scale << 28)
    return lambda: whence.Sketch("sjlt", dim=512, nonzeros=8)(gradient)


@long
def sketch_not_contiguous(folder, scale):
    gradients = large(scale << 25, 8).T
    return lambda: whence.Sketch("sjlt", dim=512)(gradients)


@long
def sketch_sklearn(folder, scale):
    from whence.sklearn import GradientSketch

    rows = large(scale * 4000, 32_768)
    return lambda: GradientSketch(512, random_state=0).fit_transform(rows)


# Stores


def stored(folder, rows, dtype="float32", **options):
    parts = -(-len(rows) * rows.shape[1] // (1 << 24))
    fill(folder / "store", rows, dtype=dtype, parts=parts, **options)
    return folder / "store"


def searching(dtype):
    def prepare(folder, scale):
        path = stored(folder, drawn(100_000, 512), dtype)
        queries = drawn(200 * scale, 512, seed=1)
        return lambda: whence.open(path).search(queries, k=100)

    prepare.__name__ = f"store_search_{dtype}"
    return long(prepare)


for dtype in ("float32", "float16", "int8", "int4", "int1"):
    searching(dtype)


@long
def store_search_filtered(folder, scale):
    rows = drawn(100_000, 512)
    path = stored(folder, rows, label=np.arange(len(rows)) % 7)
    queries = drawn(300 * scale, 512, seed=1)
    exclude = [np.arange(query, len(rows), 311).tolist() for query in range(len(queries))]
    where = {"label": [0, 2, 4, 6]}
    return lambda: whence.open(path).search(queries, k=100, where=where, exclude=exclude)


@long
def store_search_all(folder, scale):
    """All rows as hits: what is found is as large as what is searched."""
    path = stored(folder, drawn(200_000, 64))
    queries = drawn(30 * scale, 64, seed=1)
    return lambda: whence.open(path).search(queries, k=200_000)


@long
def store_open_integers(folder, scale):
    count = scale * 3_000_000
    ids = np.random.default_rng(0).permutation(count)
    path = stored(folder, np.ones((count, 1), np.float32), ids=ids)
    return lambda: whence.open(path).ids


@long
def store_open_strings(folder, scale):
    count = scale * 500_000
    ids = [f"document-{i}" for i in np.random.default_rng(0).permutation(count)]
    path = stored(folder, np.ones((count, 1), np.float32), ids=ids)
    return lambda: whence.open(path).ids


@long
def store_filter_strings(folder, scale):
    count = scale * 500_000
    ids = [f"document-{i}" for i in np.random.default_rng(0).permutation(count)]
    path = stored(folder, np.ones((count, 1), np.float32), ids=ids)
    queries = np.ones((1, 1), np.float32)
    return lambda: whence.open(path).search(queries, where=ids[::2])


@long
def store_rows(folder, scale):
    path = stored(folder, drawn(scale * 300_000, 512), "float16")
    return lambda: whence.open(path).rows()


@long
def store_self_influence(folder, scale):
    path = stored(folder, drawn(scale * 300_000, 1024), "int4")
    return lambda: whence.open(path).self_influence()


def appending(dtype):
    def prepare(folder, scale):
        rows, paths = drawn(scale * 200_000, 512), new(folder)
        ids = np.arange(len(rows))

        def call():
            writer = Writer(next(paths), manifest(512, dtype))
            writer.set_checkpoint(Checkpoint("0"))
            for first in range(0, len(rows), 50_000):
                part = slice(first, first + 50_000)
                writer.append(ids[part], rows[part], {})
            writer.close()

        return call

    prepare.__name__ = f"store_append_{dtype}"
    return long(prepare)


for dtype in ("float32", "float16", "int8", "int4", "int2", "int1"):
    appending(dtype)


# Indexes


def indexing(name, rows, **options):
    def prepare(folder, scale):
        matrix = whence.Matrix(rows(scale))
        return lambda: whence.Index(matrix, **options)

    prepare.__name__ = f"index_{name}"
    return long(prepare)


def steep(scale, dim=2048):
    """Rows most of whose energy few directions hold."""
    return drawn(scale * 8000, 40) @ drawn(40, dim, seed=1) + 0.05 * drawn(scale * 8000, dim)


indexing("certified", lambda scale: drawn(scale * 200_000, 512), basis="none")
indexing("eigen", steep, method="certified", basis="eigen")
indexing("eigen_wide", lambda scale: drawn(scale * 5000, 6000), method="certified", basis="eigen")
indexing("hnsw", lambda scale: drawn(scale * 30_000, 128), method="hnsw")


@long
def index_exact(folder, scale):
    path = stored(folder, drawn(scale * 500_000, 512), "float16")
    return lambda: whence.Index(path, "exact")


@long
def index_of_matrix(folder, scale):
    rows = drawn(scale * 300_000, 1024)
    return lambda: whence.Index(rows, "exact")


@long
def index_of_npy(folder, scale):
    np.save(folder / "rows.npy", drawn(scale * 200_000, 512))
    return lambda: whence.Index(folder / "rows.npy")


def asking(name, method="certified", rows=50_000, queries=1000, **options):
    def prepare(folder, scale):
        index = whence.Index(drawn(rows, 256), method)
        asked = drawn(queries * scale, 256, seed=1)
        return lambda: index.search(asked, **options)

    prepare.__name__ = f"index_search_{name}"
    return long(prepare)


asking("exact", "exact", k=50)
asking("certified", k=10)
asking("approximate", k=10, approximate=True)
asking("hnsw", "hnsw", k=10, approximate=True, side="helpful", queries=100_000)
asking("deep", k=5000, rows=100_000, queries=100)


@long
def index_search_diverse(folder, scale):
    rows, asked = drawn(scale * 100_000, 256), drawn(10, 256, seed=1)

    def call():
        whence.Index(rows, "exact").search(asked, k=10, diverse=500)

    return call


@long
def index_recall(folder, scale):
    index = whence.Index(drawn(100_000, 256), "certified")
    return lambda: index.recall(sample=500 * scale)


@long
def index_save(folder, scale):
    index, paths = whence.Index(drawn(scale * 1_000_000, 256), basis="none"), new(folder)
    return lambda: index.save(next(paths))


@long
def index_load(folder, scale):
    rows = whence.Matrix(drawn(scale * 700_000, 256))
    whence.Index(rows, basis="none").save(folder / "index")
    return lambda: whence.Index.load(folder / "index", rows)


@long
def index_load_hnsw(folder, scale):
    rows = whence.Matrix(drawn(scale * 100_000, 64))
    whence.Index(rows, "hnsw").save(folder / "index")
    return lambda: whence.Index.load(folder / "index", rows)


@long
def index_add(folder, scale):
    rows = drawn(scale * 300_000, 256)
    first, more = whence.Matrix(rows[: len(rows) // 2]), whence.Matrix(rows)

    def call():
        whence.Index(first, basis="none").add(more)

    return call


@long
def index_add_hnsw(folder, scale):
    rows = drawn(scale * 40_000, 64)
    first, more = whence.Matrix(rows[: len(rows) // 2]), whence.Matrix(rows)

    def call():
        whence.Index(first, "hnsw").add(more)

    return call


# Hashing


@long
def hash_sign_codes(folder, scale):
    rows = drawn(scale * 400_000, 512)
    return lambda: whence.hashing.SignHash(256).codes(rows)


@long
def hash_p_stable_codes(folder, scale):
    rows = drawn(scale * 100_000, 256)
    return lambda: whence.hashing.PStableHash(512).codes(rows)


@long
def hash_similarity(folder, scale):
    family = whence.hashing.SignHash(4096)
    codes = family.codes(drawn(20_000, 32))
    pairs = np.random.default_rng(0).integers(0, 20_000, (scale * 3_000_000, 2))
    return lambda: family.similarity(codes, pairs)


@long
def hash_index(folder, scale):
    rows = drawn(scale * 300_000, 128)
    return lambda: whence.hashing.HashIndex(rows, band=16)


@long
def hash_index_search(folder, scale):
    index = whence.hashing.HashIndex(drawn(100_000, 128))
    queries = drawn(500 * scale, 128, seed=1)
    return lambda: index.search(queries, candidates=1000)


@long
def hash_graph(folder, scale):
    rows = drawn(scale * 30_000, 32)
    return lambda: whence.hashing.hash_graph(rows, levels=3, views=2, width=16.0)


@long
def distance_graph(folder, scale):
    rows = drawn(scale * 8000, 64)
    batches = np.arange(len(rows)).reshape(-1, 4000)
    return lambda: whence.hashing.distance_graph(rows, batches)


@long
def near_duplicates(folder, scale):
    rows = drawn(scale * 10_000, 64)
    return lambda: whence.hashing.near_duplicates(rows, band=8, cap=4096)


@long
def select_instances(folder, scale):
    rows = drawn(scale * 300_000, 8)
    graph = whence.hashing.hash_graph(rows, width=4.0, k=30)
    labels = [f"class {i % 1000}" for i in range(len(rows))]
    return lambda: whence.hashing.select_instances(graph, rows, labels)


@long
def stratified_batches(folder, scale):
    labels = np.random.default_rng(0).integers(0, 1000, scale * 10_000_000)
    return lambda: whence.hashing.stratified_batches(labels, 1000)


@long
def gat_importance(folder, scale):
    from whence.hashing.gat import gat_importance as importance

    rows = drawn(500, 32)
    graph = whence.hashing.hash_graph(rows, width=16.0)
    labels = np.arange(len(rows)) % 3
    return lambda: importance(graph, rows, labels, epochs=100 * scale)


# Texts


def documents(count, words=120):
    """Texts of words as frequent as those of a language."""
    drawn = np.random.default_rng(0).zipf(1.3, (count, words)) % 100_000
    return [" ".join(f"w{word}" for word in text) for text in drawn]


@long
def text_tf_idf(folder, scale):
    texts = documents(scale * 50_000)
    return lambda: whence.text.TfIdf(texts)


@long
def text_bm25_of_tokens(folder, scale):
    tokens = list(np.random.default_rng(0).integers(0, 100_000, (scale * 20_000, 2000)))
    return lambda: whence.text.Bm25(tokens)


@long
def text_add(folder, scale):
    tokens = list(np.random.default_rng(0).integers(0, 100_000, (scale * 10_000, 2000)))
    index = whence.text.Bm25(tokens)
    return lambda: index.add(tokens)


@long
def text_search(folder, scale):
    texts = documents(50_000)
    index, queries = whence.text.Bm25(texts), texts[: 1000 * scale]
    return lambda: index.search(queries, k=10)


@long
def text_scores(folder, scale):
    texts = documents(50_000)
    index, queries = whence.text.TfIdf(texts), texts[: 1000 * scale]
    return lambda: index.scores(queries)


@long
def text_embedding(folder, scale):
    vectors = drawn(scale * 200_000, 512)
    return lambda: whence.text.Embedding(vectors)


# Other libraries' stores


def trak_folder(folder, examples, dim):
    (folder / "0").mkdir()
    described = {"JL dimension": dim, "JL matrix type": "normal", "train set size": examples}
    (folder / "metadata.json").write_text(json.dumps(described))
    (folder / "id_0.json").write_text(json.dumps({"0": {"is_featurized": 1, "is_finalized": 1}}))
    for name, values in {
        "features": drawn(examples, dim).astype(np.float16),
        "out_to_loss": np.ones((examples, 1), np.float16),
    }.items():
        with (folder / "0" / f"{name}.mmap").open("wb") as file:
            np.save(file, values)
    return folder


@long
def trak_search(folder, scale):
    path = trak_folder(folder, 200_000, 512)
    queries = drawn(200 * scale, 512, seed=1)
    return lambda: whence.interop.from_trak(path).search(queries)


@long
def trak_scores(folder, scale):
    path = trak_folder(folder, 50_000, 512)
    queries = drawn(500 * scale, 512, seed=1)
    return lambda: whence.interop.from_trak(path).scores(queries)


def bergson_folder(folder, rows, sizes, dtype):
    rows = rows if dtype == "float32" else (rows.view(np.uint32) >> 16).astype(np.uint16)
    (folder / "gradients.bin").write_bytes(rows.tobytes())
    described = {
        "num_grads": len(rows),
        "grad_sizes": sizes,
        "base_dtype": dtype,
        "num_items": len(rows),
        "attribute_tokens": False,
    }
    (folder / "info.json").write_text(json.dumps(described))
    (folder / "processor_config.yaml").write_text(
        "projection_dim: 16\nprojection_type: normal\nprojection_seed: 0\n"
    )
    return folder


@long
def bergson_converted(folder, scale):
    path = bergson_folder(folder, drawn(scale * 150_000, 1024), {"a": 1024}, "bfloat16")
    return lambda: whence.interop.from_bergson(path)


@long
def bergson_unit_norm(folder, scale):
    path = bergson_folder(folder, drawn(scale * 150_000, 1024), {"a": 512, "b": 512}, "float32")
    queries = drawn(10, 1024, seed=1)

    def call():
        whence.interop.from_bergson(path, unit_norm=True, modules=["a"]).search(queries)

    return call


@long
def bergson_hessian(folder, scale):
    import torch

    dim = 1500 * scale
    path = bergson_folder(folder, drawn(100, dim), {"a": dim}, "float32")
    root = drawn(dim, dim, seed=1)
    torch.save({"a": torch.from_numpy(root @ root.T)}, path / "hessians.pth")
    return lambda: whence.interop.from_bergson(path, hessian=path)


# Evaluation


@long
def evaluate_lds(folder, scale):
    examples, queries, subsets = 50_000, 200 * scale, 200
    random = np.random.default_rng(0)
    scores, outputs = drawn(examples, queries), drawn(subsets, 3, queries)
    masks = random.random((subsets, examples)) < 0.5
    return lambda: whence.evaluate.lds(scores, masks, outputs)


@long
def evaluate_lds_of_one_query(folder, scale):
    """Of a matrix that is one block."""
    examples, subsets = 2_000_000 * scale, 100
    scores, outputs = drawn(examples, 1), drawn(subsets, 1)
    masks = [np.arange(first, examples, 2) for first in range(subsets)]
    return lambda: whence.evaluate.lds(scores, masks, outputs)


@long
def evaluate_noise_ceiling(folder, scale):
    outputs = drawn(1000, 8, 1000 * scale)
    return lambda: whence.evaluate.noise_ceiling(outputs)


@long
def evaluate_leave_one_out(folder, scale):
    one = drawn(100_000, 200 * scale)
    return lambda: whence.evaluate.leave_one_out(one, one[::-1])


@long
def evaluate_compare(folder, scale):
    measure = whence.evaluate.measures.PerQuery
    one, other = (measure(drawn(5000, seed=seed).astype(float), "LDS") for seed in (0, 1))
    return lambda: whence.evaluate.compare(one, other, resamples=10_000 * scale)


@long
def evaluate_recall_at_k(folder, scale):
    random = np.random.default_rng(0)
    found = random.permuted(np.tile(np.arange(1000), (2000 * scale, 1)), axis=1)
    relevant = [random.permutation(1000)[:100].tolist() for _ in found]
    return lambda: whence.evaluate.recall_at_k(found, relevant, 1000)


@long
def evaluate_mislabel(folder, scale):
    scores, losses = drawn(100_000), drawn(100_000, seed=1)
    wrong = np.arange(100_000) % 10 == 0
    return lambda: whence.evaluate.mislabel(scores, wrong, losses, resamples=300 * scale)


@long
def evaluate_removal_curve(folder, scale):
    scores = drawn(300_000, 20 * scale)

    def train(places, seed):
        return len(places)

    def outputs(model):
        return np.full(scores.shape[1], float(model))

    return lambda: whence.evaluate.removal_curve(scores, train, outputs, [10, 1000], progress=False)


@long
def evaluate_subsets(folder, scale):
    return lambda: whence.evaluate.subsets(200_000, 200 * scale)


@long
def evaluate_sanity(folder, scale):
    rows = drawn(100_000, 512)
    path = stored(folder, rows, label=np.arange(len(rows)) % 10)
    return lambda: whence.evaluate.sanity(path, sample=2000 * scale)


# Models


def network(*widths, seed=0):
    import torch

    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1])


def batches(count, batch, inputs, classes=10, terms=None):
    import torch

    torch.manual_seed(1)
    shape = (batch, inputs) if terms is None else (batch, terms, inputs)
    return [
        (
            torch.arange(number * batch, (number + 1) * batch),
            torch.randn(shape),
            torch.randint(0, classes, shape[:-1]),
        )
        for number in range(count)
    ]


def loss_of(model):
    import torch

    def loss(ids, x, y):
        return torch.nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())

    return loss


def recording(name, widths=(512, 1024, 10), batch=64, terms=None, **options):
    def prepare(folder, scale):
        model, loss, paths = network(*widths), None, new(folder)
        loss = loss_of(model)
        loader = batches(16 * scale, batch, widths[0], terms=terms)
        given = {each: make(model) if callable(make) else make for each, make in options.items()}

        def call():
            with whence.record(model, next(paths), **given) as recorder:
                for ids, x, y in loader:
                    with recorder.batch(ids):
                        loss(ids, x, y).backward()

        return call

    prepare.__name__ = f"record_{name}"
    return long(prepare)


def sketch_of(kind, **options):
    return lambda model: whence.Sketch(kind, dim=1024, **options)


recording("chunked_sjlt", dim=1024, terms=64)
recording("per_layer", sketch=sketch_of("chunked_sjlt", layout="per_layer"), terms=64)
recording("sjlt", sketch=sketch_of("sjlt"))
recording("gaussian", widths=(64, 64, 10), sketch=sketch_of("gaussian"))
recording("tensorsketch", sketch=sketch_of("tensorsketch"))
recording("kronecker", sketch=sketch_of("kronecker"), terms=64)
recording("factored", layout="factored", batch=512)
recording("int4", dim=4096, dtype="int4", batch=512)
recording("functional", dim=1024, uncovered="functional")


def precondition(model):
    loader = batches(4, 256, model[0].in_features)
    return whence.fit_factors(model, loader, loss_of(model), widest=512, progress=False)


recording("preconditioned", precondition=precondition, dim=256, batch=256, widths=(256, 256, 10))


def fitting(name, widths, count=4, terms=None, **options):
    def prepare(folder, scale):
        model = network(*(width * scale if width > 10 else width for width in widths))
        loader = batches(count, 256, model[0].in_features, terms=terms)
        loss = loss_of(model)
        return lambda: whence.fit_factors(model, loader, loss, progress=False, **options)

    prepare.__name__ = f"fit_factors_{name}"
    return long(prepare)


fitting("wide", (1500, 10), until="eigenvalues")
fitting("basis", (300, 300, 10), count=16, widest=1024)
fitting("positions", (256, 256, 10), terms=64, until="eigenvalues")
fitting("vectors", (900, 10), uncovered="skip", until="eigenvalues")


@long
def factors_save(folder, scale):
    model, paths = network(1000 * scale, 10), new(folder)
    loader = batches(2, 256, 1000 * scale)
    factors = whence.fit_factors(model, loader, loss_of(model), widest=256, progress=False)

    def call():
        path = next(paths)
        factors.save(path)
        whence.Factors.load(path)

    return call


@long
def record_checkpoints(folder, scale):
    model, paths = network(256, 256, 10), new(folder)
    loader, loss = batches(16 * scale, 256, 256), loss_of(model)
    states = {str(seed): network(256, 256, 10, seed=seed).state_dict() for seed in range(2)}
    factors = whence.fit_factors(model, loader[:4], loss, states=states, widest=512, progress=False)

    def call():
        whence.record_checkpoints(
            model,
            next(paths),
            loader,
            loss,
            precondition=factors,
            states=states,
            dim=256,
            progress=False,
        )

    return call


@long
def compress(folder, scale):
    model, paths = network(256, 256, 10), new(folder)
    loader, loss = batches(12 * scale, 256, 256), loss_of(model)
    factors = whence.fit_factors(model, loader[:4], loss, widest=64, progress=False)
    options = {"precondition": factors, "rotate": False, "dtype": "int4"}
    with whence.record(model, folder / "store", **options) as recorder:
        for ids, x, y in loader:
            with recorder.batch(ids):
                loss(ids, x, y).backward()
    return lambda: whence.compress(folder / "store", next(paths), dim=512, progress=False)


@long
def query(folder, scale):
    model = network(256, 256, 10)
    loss = loss_of(model)
    with whence.record(model, folder / "store", dim=4096) as recorder:
        for ids, x, y in batches(64, 256, 256):
            with recorder.batch(ids):
                loss(ids, x, y).backward()
    ids, x, y = batches(1, 1024 * scale, 256)[0]
    return lambda: whence.query(model, folder / "store", lambda: loss(ids, x, y), k=100)


@long
def query_factored(folder, scale):
    model = network(256, 256, 10)
    loss = loss_of(model)
    with whence.record(model, folder / "store", layout="factored") as recorder:
        for ids, x, y in batches(64, 256, 256):
            with recorder.batch(ids):
                loss(ids, x, y).backward()
    ids, x, y = batches(1, 256 * scale, 256)[0]
    return lambda: whence.query(model, folder / "store", lambda: loss(ids, x, y), k=10)


@long
def verify_rows(folder, scale):
    model = network(1024, 1024 * scale, 10)
    loss, (ids, x, y) = loss_of(model), batches(1, 64, 1024)[0]
    with whence.record(model, folder / "store", dim=1024) as recorder:
        recorder.verify(loss, (ids, x, y))
    paths = new(folder)

    def call():
        with whence.record(model, next(paths), dim=1024) as recorder:
            for _ in range(10):
                recorder.verify(loss, (ids, x, y))

    return call


# Methods


def scoring(name, method, widths=(128, 128, 10), count=12, asked=64):
    def prepare(folder, scale):
        from whence import methods

        model = network(*widths)
        loss, loader = loss_of(model), batches(count * scale, 256, widths[0])
        run = methods.Run(model, loader, loss)
        ids, x, y = batches(1, asked, widths[0])[0]
        paths = new(folder)

        def call():
            made = method(methods, model, next(paths))
            made.fit(run).scores(lambda: loss(ids, x, y))

        return call

    prepare.__name__ = f"method_{name}"
    return long(prepare)


scoring("gradient_dot", lambda methods, *_: methods.GradientDot())
scoring("gradient_cosine", lambda methods, *_: methods.GradientCosine())
scoring("tracin", lambda methods, *_: methods.TracInCP())
scoring("gauss_newton", lambda methods, *_: methods.GaussNewton(damping=0.1), (300, 10), 2)
scoring("ekfac", lambda methods, *_: methods.Ekfac())
scoring("ekfac_rank", lambda methods, *_: methods.Ekfac(rank=2), (256, 512, 10), 4)
scoring("ekfac_stored", lambda methods, model, path: methods.EkfacStored(path, 256))
scoring(
    "two_stage",
    lambda methods, model, path: methods.TwoStage(methods.EkfacStored(path, 256), methods.Ekfac()),
)
scoring("damped_gram", lambda methods, *_: methods.DampedGram(2048))
scoring("trak", lambda methods, *_: methods.Trak(2048))
scoring(
    "representer", lambda methods, *_: methods.RepresenterPoints("2", 0.01), count=40, asked=2048
)


@long
def method_less(folder, scale):
    import torch

    from whence import methods

    model = network(128, 128, 10)
    loss, loader = loss_of(model), batches(30 * scale, 256, 128)
    optimizer = torch.optim.Adam(model.parameters())
    loss(*loader[0]).backward()
    optimizer.step()
    moments = {"0": whence.moments_of(optimizer, model)}
    run = methods.Run(model, loader, loss)

    def call():
        methods.Less(moments).fit(run).scores(lambda: loss(*loader[0]))

    return call


@long
def method_suspicion(folder, scale):
    from whence import methods

    model = network(128, 128, 10)
    loader = batches(12 * scale, 256, 128)
    run = methods.Run(model, loader, loss_of(model))
    losses = np.ones(len(loader) * 256)
    return lambda: methods.suspicion(run, losses)
