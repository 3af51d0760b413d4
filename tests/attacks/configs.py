"""Config files of a command, and JSON that a run finds in its own folders."""

import json
from pathlib import Path

from tests.attacks.registry import Maker, attack, each

BASE = """
method: nnclr
name: x
backbone: {name: resnet18, kwargs: {channels: [4, 4, 4, 8], layers: [1, 1, 1, 1]}, stem: imagenet}
method_kwargs: {proj_hidden_dim: 16, proj_output_dim: 8, pred_hidden_dim: 16, queue_size: 32}
data: {dataset: fake, train_size: 32}
augmentations: [{crop_size: 16, num_crops: 2}]
optimizer: {batch_size: 8}
"""


def yaml_file(addition: str, base: str = BASE, **others: str) -> Maker:
    def make(file: Path, ran: Path) -> None:
        for name, content in {file.stem: addition + base, **others}.items():
            path = file.parent / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content.replace("RAN", str(ran)))

    return make


TOUCH = "{_target_: builtins.open, file: RAN, mode: w}"
LOGGING = "{version: 1, handlers: {x: {class: logging.FileHandler, filename: RAN}}, root: {handlers: [x]}}"
each(
    "yaml",
    object_apply=yaml_file("extra: {x: !!python/object/apply:os.system ['touch RAN']}"),
    object_new=yaml_file("extra: {x: !!python/object/new:os.system ['touch RAN']}"),
    name=yaml_file("extra: {x: !!python/name:os.system }"),
    module=yaml_file("extra: {x: !!python/module:antigravity }"),
    tuple=yaml_file("extra: {x: !!python/tuple [1, 2]}"),
    own_tag=yaml_file("extra: {x: !evil [1, 2]}"),
    binary=yaml_file("extra: {x: !!binary aGVsbG8=}"),
    target=yaml_file(f"_target_: os.system\nx: {TOUCH}"),
    target_in_data=yaml_file("", BASE.replace("dataset: fake", "_target_: os.system, dataset: fake")),
    target_in_kwargs=yaml_file("", BASE.replace("kwargs: {", f"kwargs: {{block: {TOUCH}, ")),
    target_as_method=yaml_file("", BASE.replace("method: nnclr", f"method: {TOUCH}")),
    target_as_views=yaml_file("", BASE.replace("augmentations: [", f"augmentations: [{TOUCH}, ")),
    aliases=yaml_file("a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9))),
    alias_of_itself=yaml_file("extra: &x {y: *x}\n"),
    merge_keys=yaml_file("a: &a {x: 1}\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} {{l: *{chr(97 + i)}, r: *{chr(97 + i)}, <<: *{chr(97 + i)}}}\n" for i in range(24))),
    interpolations=yaml_file("extra:\n  a0: xxxxxxxxxxxxxxxx\n" + "".join(
        f"  a{i + 1}: '${{extra.a{i}}}${{extra.a{i}}}'\n" for i in range(40))),
    deep=yaml_file("extra: " + "[" * 5_000 + "]" * 5_000),
    large=yaml_file("extra: {x: [" + "1," * (1 << 20) + "1]}"),
    not_text=lambda file, ran: file.write_bytes(b"method: \xff\xfe\n"),
    with_nul=lambda file, ran: file.write_bytes(b"method: nnclr\0\n"),
    no_yaml=yaml_file("method: [nnclr\n", ""),
    twice=yaml_file("method: sce\n"),
    unknown_resolver=yaml_file("extra: {x: '${eval:1+1}'}"),
    hydra_callbacks=yaml_file(f"hydra: {{callbacks: {{x: {TOUCH}}}}}"),
    hydra_logging=yaml_file(f"hydra: {{job_logging: {LOGGING}}}"),
    hydra_hydra_logging=yaml_file(f"hydra: {{hydra_logging: {LOGGING}}}"),
    hydra_launcher=yaml_file(f"hydra: {{launcher: {TOUCH}, mode: MULTIRUN}}"),
    hydra_sweeper=yaml_file("hydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2'}}}"),
    hydra_environment=yaml_file("hydra: {job: {env_set: {LD_PRELOAD: /tmp/evil.so}}}"),
    hydra_searchpath=yaml_file("hydra: {searchpath: ['pkg://evil', 'file:///etc']}"),
    hydra_by_package=yaml_file(f"# @package hydra\ncallbacks: {{x: {TOUCH}}}\n", ""),
    hydra_by_defaults=yaml_file("defaults: [_self_, part@hydra.callbacks: evil]\n", part__evil=f"x: {TOUCH}"),
    hydra_by_folder=yaml_file("defaults: [_self_, hydra/callbacks: evil]\n", hydra__callbacks__evil=f"x: {TOUCH}"),
    hydra_by_global=yaml_file(
        "defaults: [_self_, part: evil]\n", part__evil=f"# @package _global_\nhydra: {{callbacks: {{x: {TOUCH}}}}}"),
    defaults_above=yaml_file("defaults: [_self_, ../../evil]\n"),
    defaults_group_above=yaml_file("defaults: [_self_, ../x: evil]\n"),
    defaults_absolute=yaml_file("defaults: [_self_, /etc/passwd]\n"),
    defaults_package=yaml_file("defaults: [_self_, 'pkg://evil/x']\n"),
    name_above=yaml_file("", BASE.replace("name: x", "name: ../../x")),
    name_of_a_shell=yaml_file("", BASE.replace("name: x", "name: 'x; touch RAN'")),
    name_substituted=yaml_file("", BASE.replace("name: x", "name: '$(touch RAN)'")),
    name_of_two_lines=yaml_file("", BASE.replace("name: x", 'name: "x\\ntouch RAN"')),
    name_hidden=yaml_file("", BASE.replace("name: x", "name: .ssh")),
    name_a_flag=yaml_file("", BASE.replace("name: x", "name: -rf")),
    method_elsewhere=yaml_file("", BASE.replace("method: nnclr", "method: 'os:system'")),
    dataset_elsewhere=yaml_file("", BASE.replace("dataset: fake", "dataset: 'os:system'")),
    teacher_hub=yaml_file("", BASE.replace("method: nnclr", "method: mvmr").replace(
        "method_kwargs: {", "method_kwargs: {teacher: {name: 'hf-hub:somebody/evil'}, ")),
)

JSONS = {
    "deep": b"[" * 200_000, "huge": b"[" + b"1," * (4 << 20) + b"1]", "list": b"[]", "no-text": b"\xff\xfe", "number": b"1",
    "code": b"__import__('os')",
}
for name, content in JSONS.items():
    attack(f"results/{name}")(lambda file, ran, content=content: file.write_bytes(content))
    attack(f"search/{name}")(lambda file, ran, content=content: file.write_bytes(content))
SERVED = {"id": "abc", "folder": "/tmp", "steps": {"train/loss": 1}}
KEPT = JSONS | {
    name: json.dumps({**SERVED, **changes}).encode() for name, changes in {
        "id-an-address": {"id": "../x?y"}, "id-of-lines": {"id": "a\nb"}, "id-long": {"id": "a" * 999},
        "id-a-number": {"id": 7}, "folder-a-number": {"folder": 1}, "folder-long": {"folder": "a" * 9999},
        "steps-a-list": {"steps": [1]}, "steps-of-text": {"steps": {"a": "1"}}, "steps-deep": {"steps": {"a": {"b": 1}}},
    }.items()
}
for name, content in KEPT.items():
    attack(f"server/{name}")(lambda file, ran, content=content: file.write_bytes(content))
