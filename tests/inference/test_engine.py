"""The sampling engine beside a plain loop of the reference: table, guidance, bad input."""

import copy
import math

import pytest
import torch
from torch import nn

import ditfast
from ditfast import reference
from ditfast.inference import Engine, Guidance, Sampler, ScheduleTable
from ditfast.parity import judge
from ditfast.testing.inputs import randomize_

CONFIG = ditfast.DiTConfig(depth=3, hidden_size=96, num_heads=4, latent_size=8, num_classes=10)
LABELS = [3, 0, 9]


def models(**changes):
    """(fast, reference) with the same random weights, of a size that keeps trajectories near their noise."""
    slow = reference.DiT(ditfast.DiTConfig(**{**vars(CONFIG), **changes}))
    randomize_(slow)
    with torch.no_grad():
        slow.final_layer.linear.weight.mul_(0.2)
    fast = ditfast.DiT(slow.config)
    fast.load_state_dict(slow.state_dict())
    return fast.eval(), slow.eval()


def noise(count=3, channels=4, seed=0):
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def generators(count=3):
    return [torch.Generator().manual_seed(100 + i) for i in range(count)]


@torch.no_grad()
def plain_loop(model, sampler, guidance, labels=LABELS, dtype=torch.float32, start=None):
    """The plain loop, every modulation computed in every step."""
    x = sampler.start((noise(len(labels)) if start is None else start).to(dtype))
    draws, y = generators(len(labels)), torch.tensor(labels, device=sampler.timesteps.device)
    weights = next(model.parameters()).dtype
    for i, t in enumerate(sampler.timesteps):
        model_input = sampler.model_input(x, i).to(weights)
        scale = 1.0 if guidance is None else guidance.scale_at(float(t))
        if scale == 1:
            output = model(model_input, t.expand(len(y)), y)
        else:
            all_labels = torch.cat([y, torch.full_like(y, model.config.null_class)])
            output = model(torch.cat([model_input, model_input]), t.expand(len(all_labels)), all_labels)
            output = guidance.apply(output, scale, x.shape[1])
        x = sampler.step(x, output.to(dtype), i, draws)
    return x


def assert_parity(engine, slow, guidance, labels=LABELS, dtype=torch.float32):
    """Final latents by the rule for models: the reference's plain loop is the yardstick, in fp64 the oracle."""
    actual = engine(noise(len(labels)), labels, generators(len(labels)))
    expected = plain_loop(slow, engine.sampler, guidance, labels)
    # an ancestral solver would draw other noise in fp64
    solver = torch.float32 if engine.sampler.name == "ddpm" else torch.float64
    exact = plain_loop(copy.deepcopy(slow).double(), engine.sampler, guidance, labels, solver)
    verdict = judge("model", actual, expected, exact, dtype)
    assert verdict.ok, verdict
    assert verdict.yardstick < 1000 * torch.finfo(dtype).eps  # else only rounding would be compared


@pytest.mark.quick
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "euler", "heun"])
@pytest.mark.parametrize("table_mib", [0, 1024])
def test_every_sampler(sampler, table_mib):
    fast, slow = models()
    solver = Sampler(sampler, 5)
    guidance = Guidance(3.0, span=solver.span)
    assert_parity(Engine(fast, solver, guidance, table_mib=table_mib), slow, guidance)


@pytest.mark.parametrize(
    "guidance",
    [
        None,
        Guidance(1.0),
        Guidance(2.0, channels="all"),
        Guidance(4.0, interval=(200.0, 700.0)),
        Guidance(4.0, power=4.0),
        Guidance(4.0, rescale=0.7),
    ],
    ids=str,
)
def test_guidance(guidance):
    fast, slow = models()
    assert_parity(Engine(fast, Sampler("ddim", 6), guidance), slow, guidance)


@pytest.mark.parametrize("design", ["adaln", "adaln_zero", "in_context", "cross_attention"])
def test_block_designs(design, monkeypatch):
    fast, slow = models(conditioning=design)
    rows = rows_made(monkeypatch)
    assert_parity(Engine(fast, Sampler("ddim", 4), Guidance(2.0)), slow, Guidance(2.0))
    assert rows == ([4 * 4] if design.startswith("adaln") else [])


@pytest.mark.parametrize("changes", [{"learn_sigma": False}, {"timestep_freq_shift": 1.0, "norm2_eps": 1e-5}], ids=str)
def test_other_constants(changes):
    fast, slow = models(**changes)
    assert_parity(Engine(fast, Sampler("ddpm", 4), Guidance(2.0)), slow, Guidance(2.0))


@pytest.mark.quick
def test_low_precision():
    fast, slow = models()
    fast, slow = fast.bfloat16(), slow.bfloat16()
    assert_parity(Engine(fast, Sampler("ddim", 5), Guidance(2.0)), slow, Guidance(2.0), dtype=torch.bfloat16)


@pytest.mark.kernels
def test_with_the_kernels():
    # guidance makes two rows of one image
    fast, slow = models(depth=2)
    with ditfast.ops.use_backend("triton"):
        actual = Engine(fast, Sampler("ddim", 2), Guidance(2.0))(noise(1), LABELS[:1])
    expected, exact = (
        plain_loop(model, Sampler("ddim", 2), Guidance(2.0), LABELS[:1], dtype)
        for model, dtype in ((slow, torch.float32), (copy.deepcopy(slow).double(), torch.float64))
    )
    assert judge("model", actual, expected, exact, torch.float32).ok


def rows_made(monkeypatch):
    """How many rows each of the table's GEMMs has, as they come."""
    rows, modulation = [], ditfast.DiT.modulation
    monkeypatch.setattr(ditfast.DiT, "modulation", lambda model, t, y: rows.append(len(t)) or modulation(model, t, y))
    return rows


def step_mib(model, labels):
    rows = sum(layer.adaLN_modulation[1].out_features for layer in (*model.blocks, model.final_layer))
    return labels * rows * 4 / 2**20


def test_the_table_is_made_in_chunks_within_its_budget(monkeypatch):
    fast, slow = models()
    rows = rows_made(monkeypatch)
    steps, labels = 7, 4  # three, and the null class once for all
    size = step_mib(fast, labels)
    guidance = Guidance(2.0)
    for budget, chunks in [(100, [7]), (size * 3.5, [3, 3, 1]), (size, [1] * 7)]:
        rows.clear()
        sampler = Sampler("ddim", steps)
        assert_parity(Engine(fast, sampler, guidance, table_mib=budget), slow, guidance)
        assert rows == [labels * chunk for chunk in chunks]
        table = ScheduleTable(fast, sampler.timesteps, [*LABELS, 10], budget)
        assert table.mib <= budget and math.isclose(table.mib, size * chunks[0])
    with pytest.raises(ValueError, match=r"table_mib must hold at least one step .* 4 labels take [\d.]+ MiB a step"):
        Engine(fast, Sampler("ddim", steps), guidance, table_mib=size * 0.9)(noise(), LABELS)


@pytest.mark.quick
def test_the_loop_reads_no_adaln_weight():
    fast, slow = models()
    table = ScheduleTable(fast, torch.tensor([900, 5]), [*LABELS, 10], 100)
    modulations = [table.at(i, table.rows(LABELS)) for i in range(2)]
    with torch.no_grad():
        for part in (fast.t_embedder, fast.y_embedder, *(x.adaLN_modulation for x in (*fast.blocks, fast.final_layer))):
            for parameter in part.parameters():
                parameter.fill_(math.nan)
        outputs = [fast.forward_modulated(noise(), modulation) for modulation in modulations]
        for ours, t in zip(outputs, (900, 5), strict=True):
            condition = torch.full((3,), t), torch.tensor(LABELS)
            exact = copy.deepcopy(slow).double()(noise().double(), *condition)
            assert judge("model", ours, slow(noise(), *condition), exact, torch.float32).ok


def test_a_table_is_made_in_every_call(monkeypatch):
    fast, slow = models()
    rows = rows_made(monkeypatch)
    engine = Engine(fast, Sampler("ddim", 3), Guidance(2.0))
    for labels in (LABELS, LABELS, [5, 5]):
        assert_parity(engine, slow, engine.guidance, labels)
    assert rows == [4 * 3, 4 * 3, 2 * 3]  # its labels and the null class
    rows.clear()
    engine.guidance = Guidance(1.0)
    assert_parity(engine, slow, engine.guidance)
    assert rows == [3 * 3]  # without guidance the null class is not read


def loaded(model):
    torch.manual_seed(5)
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})


def written(model):
    with torch.no_grad():
        model.t_embedder.mlp[2].bias.add_(1)


def stepped(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.01, fused=True).step()


def replaced(model):
    linear = model.blocks[1].adaLN_modulation[1]
    linear.weight = nn.Parameter(linear.weight.detach() * 2)


def test_changed_layers_are_called():
    fast, slow = models()
    called = []
    fast.blocks[1].adaLN_modulation[1].register_forward_hook(lambda *_: called.append(1))
    engine = Engine(fast, Sampler("ddim", 3), Guidance(2.0))
    assert_parity(engine, slow, Guidance(2.0))
    assert called == [1]  # where the table is made
    for model in (fast, slow):
        model.blocks[0].adaLN_modulation[0] = nn.GELU()
    assert_parity(Engine(fast, Sampler("ddim", 3), Guidance(2.0)), slow, Guidance(2.0))


def test_a_model_of_another_codebase():
    _, slow = models()
    batches = []

    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = slow

        def forward(self, x, t, y):
            batches.append(len(x))
            return self.inner(x, t, y)

    foreign = Foreign().eval()
    with pytest.raises(ValueError, match="guidance needs a null class, and the model's config has none"):
        Engine(foreign, Sampler("ddim", 3), Guidance(2.0))
    assert_parity(Engine(foreign, Sampler("ddim", 3), Guidance(2.0), null_class=10), slow, Guidance(2.0))
    assert batches == [6, 6, 6]
    batches.clear()
    assert_parity(Engine(foreign, Sampler("ddim", 3)), slow, None)
    assert batches == [3, 3, 3]


def test_an_image_is_the_same_whatever_its_neighbours():
    fast, slow = models()
    sampler, guidance = Sampler("ddpm", 4), Guidance(2.0)
    engine = Engine(fast, sampler, guidance)
    expected = plain_loop(slow, sampler, guidance)
    exact = plain_loop(copy.deepcopy(slow).double(), sampler, guidance)
    for i in range(3):
        alone = engine(noise()[i : i + 1], LABELS[i : i + 1], generators()[i : i + 1])
        verdict = judge("model", alone[0], expected[i], exact[i], torch.float32)
        assert verdict.ok, (i, verdict)


def test_latents_that_are_not_finite_stop_the_run():
    fast, _ = models()
    steps = []
    engine = Engine(fast, Sampler("ddim", 60))
    with torch.no_grad():
        fast.y_embedder.embedding_table.weight[0] = math.nan
    with pytest.raises(ValueError, match="latents are not finite from step 1 of 60 on, image 1 of the batch"):
        engine(noise(), LABELS, on_step=steps.append)
    assert len(steps) < 60
    start = noise()
    start[2, 0, 0, 0] = math.inf
    with pytest.raises(ValueError, match="from step 1 of 60 on, image 2 of the batch"):
        engine(start, [3, 3, 3])


def test_labels_of_a_tensor():
    fast, _ = models()
    engine = Engine(fast, Sampler("ddpm", 3), Guidance(2.0))
    expected = engine(noise(), LABELS, generators())
    assert torch.equal(engine(noise(), torch.tensor(LABELS), generators()), expected)


@pytest.mark.parametrize(
    ("labels", "count", "message"),
    [
        ([10, 0, 0], 3, "labels must be in 0..9, got 10"),
        ([-1, 0, 0], 3, "labels must be in 0..9, got -1"),
        ([1, 2], 3, r"noise must have shape \(2, C, h, w\), got \(3, 4, 8, 8\)"),
        ([], 0, r"noise must have shape"),
    ],
)
def test_bad_input(labels, count, message):
    fast, _ = models()
    with pytest.raises(ValueError, match=message):
        Engine(fast, Sampler("ddim", 3))(noise(count), labels)


def test_training_mode_and_other_bad_input():
    fast, _ = models()
    with pytest.raises(ValueError, match="model is in training mode"):
        Engine(fast.train(), Sampler("ddim", 3))(noise(), LABELS)
    with pytest.raises(ValueError, match="table_mib must be 0 or more, got -1"):
        Engine(fast, Sampler("ddim", 3), table_mib=-1)
    with pytest.raises(TypeError, match="^Engine takes no labels any more: .* every call; leave it out$"):
        Engine(fast, Sampler("ddim", 3), labels=LABELS)
    with pytest.raises(TypeError, match=r"^Engine\(\) got an unexpected keyword argument 'table'$"):
        Engine(fast, Sampler("ddim", 3), table=2)
    with pytest.raises(ValueError, match="guidance needs a null class"):
        Engine(models(class_dropout_prob=0.0)[0], Sampler("ddim", 3), Guidance(2.0))
    with pytest.raises(ValueError, match="only adaLN designs are modulated, this model is in_context"):
        models(conditioning="in_context")[0].modulation(torch.tensor([1]), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"modulation must have shape \(3, \d+\), got \(2, 5\)"):
        fast.forward_modulated(noise(), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"x must have shape \(B, 4, 8, 8\), got \(3, 4, 4, 4\)"):
        fast.forward_modulated(torch.zeros(3, 4, 4, 4), torch.zeros(3, 5))


class Straight:
    """A sampler without diffusers, which a GPU machine may lack: equal steps against the predicted noise."""

    def __init__(self, steps):
        self.timesteps = torch.linspace(999, 0, steps, device="cuda").long()

    def start(self, noise):
        return noise

    def model_input(self, x, i):
        return x

    def step(self, x, output, i, generators=None):
        return x - output[:, : x.shape[1]] / len(self.timesteps)


@pytest.mark.gpu
@pytest.mark.parametrize("design", ["adaln_zero", "in_context"])
def test_graphs(design):
    """Captured steps: right at once, after weights were loaded in place or moved, for other scales, labels, shapes."""
    fast, slow = (model.cuda() for model in models(conditioning=design))
    sampler = Straight(6)
    engine = Engine(fast, sampler, Guidance(4.0, interval=(200.0, 900.0)))
    for count, guidance in [(3, engine.guidance), (2, engine.guidance), (3, Guidance(1.5)), (3, None)]:
        engine.guidance = guidance
        for change in (lambda _: None, loaded, replaced if design == "adaln_zero" else loaded):
            for model in (fast, slow):
                change(model)
            labels = LABELS[:count]
            actual = engine(noise(count).cuda(), labels, generators(count))
            start = noise(count).cuda()
            expected = plain_loop(slow, sampler, guidance, labels, start=start)
            exact = plain_loop(copy.deepcopy(slow).double(), sampler, guidance, labels, torch.float64, start)
            verdict = judge("model", actual, expected, exact, torch.float32)
            assert verdict.ok, verdict
            assert 1 <= len(engine.graphs) <= 4
    fast.blocks[0].register_forward_hook(lambda *_: None)
    assert engine.graphs.unavailable() == "the model has hooks, which a replay would not call"
    engine(noise().cuda(), LABELS)
    assert not engine.graphs


def test_why_there_are_no_graphs():
    fast, _ = models()
    engine = Engine(fast, Sampler("ddim", 3))
    assert engine.graphs.unavailable() == "the model is on cpu"
    assert Engine(fast, Sampler("ddim", 3), graphs=False).graphs is None
