"""VGG19 against torch, in torchvision's layout and timm's: every stage, the logits, every gradient.

The reference runs in float64, so that the difference is our rounding: sums of up to 4608 float32 products (3 x 3 x 512)
in a convolution have a relative error of about sqrt(4608) * 6e-8 = 4e-6, over 19 layers a few times that. A ReLU whose
input is within rounding of zero may open on one side only, which shows in single gradients: hence 1e-4 of the largest
for activations and 1e-3 in gradients for the worst entry, with a mean error below 1e-5 of the largest. Winograd's
convolutions, on a CPU, round several times as much. Gradients are within 1e-6 up to the first ReLU that opens on one
side only, and 3e-2 of the norm below some, as each changes single gradients of one image in full;
`test_winograd.py` has them without ReLUs. (cuDNN takes such convolutions too.)
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtl.models import kernels, presets, stages
from jaxtl.weights import convert, files, tables

torch = pytest.importorskip("torch")


def reference_vgg19(classes):
    """VGG19 as torchvision lays it out: `features` and `classifier`, each a Sequential."""
    nn = torch.nn
    layers, channels = [], 3
    for width in (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"):
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    hidden = [nn.Linear(25088, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()]
    model = nn.Module()
    model.features = nn.Sequential(*layers)
    model.classifier = nn.Sequential(*hidden, nn.Linear(4096, classes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # He's standard deviation keeps the activations' size; biases are not zero, so that a mix-up shows.
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 10_000
            parameter.copy_((2 / fan_in) ** 0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def timm_names(state):
    """The same weights as timm stores them: the classifier's hidden layers are convolutions."""
    renamed = {name: value for name, value in state.items() if name.startswith("features.")}
    renamed["pre_logits.fc1.weight"] = state["classifier.0.weight"].reshape(4096, 512, 7, 7)
    renamed["pre_logits.fc2.weight"] = state["classifier.3.weight"].reshape(4096, 4096, 1, 1)
    renamed["head.fc.weight"] = state["classifier.6.weight"]
    for theirs, ours in (("classifier.0", "pre_logits.fc1"), ("classifier.3", "pre_logits.fc2")):
        renamed[f"{ours}.bias"] = state[f"{theirs}.bias"]
    renamed["head.fc.bias"] = state["classifier.6.bias"]
    return renamed


def port(top):
    config = presets.PRESETS["vgg19"]

    def build(rngs):
        return presets.backbone(config, top=top, dtype=jnp.float32, rngs=rngs)

    return tables.table(config, top=top), *stages.abstract(build)


def close(ours, theirs, worst, what):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, what
    error, largest = np.abs(ours - theirs), np.abs(theirs).max()
    assert error.max() <= worst * largest, f"{what}: off by {error.max():.3g}, largest value {largest:.3g}"
    assert error.mean() <= 1e-5 * largest, f"{what}: off by {error.mean():.3g} in the mean"


@pytest.mark.slow
def test_vgg19_equals_torch_at_every_stage_in_logits_and_gradients(tmp_path):
    model = reference_vgg19(1000)
    torch.save(model.state_dict(), tmp_path / "vgg19.pth")
    table, structure, targets, names = port(top="classifier")
    params = convert.read(table, files.Checkpoint(tmp_path / "vgg19.pth"), targets, "torchvision")
    images = np.random.default_rng(0).random((1, 224, 224, 3)).astype(np.float32)

    def trace(params):
        bound = stages.bind(structure, params)
        x, outputs = jnp.asarray(images), {}
        for name in names:
            x = outputs[name] = bound(x, start=name, stop=name)
        return outputs

    model = model.double()
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).double()
    theirs = []
    for layer in model.features:
        x = layer(x)
        if not isinstance(layer, torch.nn.Conv2d):  # a stage of ours is a convolution with its ReLU, or a pool
            theirs.append(x.detach().numpy().transpose(0, 2, 3, 1))
    logits = model.classifier(x.flatten(1))
    direction = np.random.default_rng(1).standard_normal(logits.shape)
    (logits * torch.from_numpy(direction)).sum().backward()
    expected = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    expected = convert.read(table, expected, targets, "gradients")

    def loss(params):
        outputs = trace(params)
        return jnp.sum(outputs["predictions"] * direction.astype(np.float32)), outputs

    for by_definition in (True, False):
        with kernels.plain() if by_definition else contextlib.nullcontext():
            # Not the same function twice: what JAX has traced it does not trace again.
            gradients, ours = jax.jit(jax.grad(lambda params: loss(params), has_aux=True))(params)
        for name, state in zip(names, theirs, strict=False):
            close(ours[name], state, 1e-4, name)
        close(ours["predictions"], logits.detach(), 1e-4, "logits")
        for path, value in expected.items():
            if by_definition:
                close(gradients[path], value, 1e-3, path)
            else:
                assert np.linalg.norm(gradients[path] - value) < 3e-2 * np.linalg.norm(value), path


@pytest.mark.slow
def test_timm_and_torchvision_layouts_give_the_same_parameters_and_export_restores_them():
    state = {name: value.numpy() for name, value in reference_vgg19(10).state_dict().items()}
    table, _, targets, _ = port(top="classifier")
    targets |= {
        path: jax.ShapeDtypeStruct((*leaf.shape[:-1], 10), leaf.dtype)
        for path, leaf in targets.items()
        if path.startswith("predictions")
    }
    ours = convert.read(table, state, targets, "torchvision")
    from_timm = convert.read(table, timm_names(state), targets, "timm")
    assert ours.keys() == from_timm.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, from_timm[path], path)
    written = convert.write(table, ours)
    assert written.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(written[name], value, name)
    # Without the classifier, its arrays are left aside by name, in both layouts.
    table, _, targets, _ = port(top=None)
    for layout in (state, timm_names(state)):
        features = convert.read(table, layout, targets, "features only")
        assert sum(value.size for value in features.values()) == 20_024_384
