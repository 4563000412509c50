"The families of backbones: a tiny random checkpoint of each, written to disk, loaded back, and used as a real one would be. No torchvision, no hub."
import importlib.util, json, shutil
import numpy as np, polars as pl, pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.record import load_run
from mmrec_wb.data import load_dataset
from mmrec_wb.data.features import add_features
from mmrec_wb.mllm.backbones import backbone_vectors, check_backbone, load_backbone, lora_config
from mmrec_wb.mllm.prompts import Collator
from mmrec_wb.mllm.tasks import yes_no_examples
from mmrec_wb.mllm.scoring import score_yes_no

# ---- tiny checkpoints: the real architectures and processors, with a byte-level BPE and random weights
CONTENT = ("{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
           "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}")
QWEN_CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + CONTENT.replace('IMAGE', '<|vision_start|><|image_pad|><|vision_end|>')
             + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SMOL_CHAT = ("<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}: " + CONTENT.replace('IMAGE', '<image>')
             + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}")

def tokenizer(special, chat, **roles):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE()); bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False); bpe.decoder = decoders.ByteLevel()
    words = ['Items that a person took, oldest first: Will this person take this item next? Answer Yes or No. no picture user assistant Assistant: Yes No']*20
    bpe.train_from_iterator(words, trainers.BpeTrainer(vocab_size=500, special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=chat, additional_special_tokens=special[1:], **roles)

TEXT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
            initializer_range=.2)

def qwen(folder):
    "Qwen2.5-VL: patches of 14 px, four of them a token; three-dimensional positions."
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil
    tok = tokenizer(['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>', '<|image_pad|>', '<|video_pad|>'], QWEN_CHAT,
                    pad_token='<|endoftext|>', eos_token='<|im_end|>')
    ids = tok.convert_tokens_to_ids
    rope = dict(rope_type='default', rope_theta=1e4, mrope_section=[2, 3, 3])
    config = Qwen2_5_VLConfig(text_config=dict(**TEXT, vocab_size=len(tok), rope_parameters=rope, pad_token_id=tok.pad_token_id,
            eos_token_id=tok.eos_token_id, bos_token_id=None, tie_word_embeddings=True),
        vision_config=dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, patch_size=14, spatial_merge_size=2,
                           temporal_patch_size=2, window_size=56, fullatt_block_indexes=[1], initializer_range=.2),
        image_token_id=ids('<|image_pad|>'), video_token_id=ids('<|video_pad|>'), vision_start_token_id=ids('<|vision_start|>'),
        vision_end_token_id=ids('<|vision_end|>'), tie_word_embeddings=True)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder); tok.save_pretrained(folder)
    # as in the published checkpoints: one preprocessor_config.json that names the whole processor
    Qwen2VLImageProcessorPil(min_pixels=56*56, max_pixels=28*28*1280).save_pretrained(folder)
    file = folder/'preprocessor_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(processor_class='Qwen2_5_VLProcessor', image_processor_type='Qwen2VLImageProcessor')))

def idefics3(folder, smolvlm=False):
    "Idefics3, with tiles of 32 px, few enough to be cut into; SmolVLM, the same under another name, with the published tiles of 512 px. Four tokens a tile."
    import transformers as t
    tok = tokenizer(['<|endoftext|>', '<|im_start|>', '<image>', '<fake_token_around_image>', '<global-img>', '<end_of_utterance>',
                     *[f'<row_{r}_col_{c}>' for r in range(1, 7) for c in range(1, 7)]], SMOL_CHAT,
        pad_token='<|endoftext|>', eos_token='<end_of_utterance>')
    name, tile, edge = ('SmolVLM', 512, 2048) if smolvlm else ('Idefics3', 32, 64)
    config = getattr(t, f'{name}Config')(
        text_config=dict(model_type='llama', **TEXT, vocab_size=len(tok), pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id, bos_token_id=1),
        vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=tile, patch_size=tile//4,
                           initializer_range=.2),
        image_token_id=tok.convert_tokens_to_ids('<image>'), scale_factor=2, pad_token_id=tok.pad_token_id, tie_word_embeddings=False)
    getattr(t, f'{name}ForConditionalGeneration')(config).save_pretrained(folder); tok.save_pretrained(folder)
    getattr(t, f'{name}ImageProcessorPil')(size=dict(longest_edge=edge), max_image_size=dict(longest_edge=tile)).save_pretrained(folder)
    (folder/'processor_config.json').write_text(json.dumps(dict(processor_class=f'{name}Processor', image_seq_len=4)))

def llava(folder):
    model, processor = load_backbone('tiny', ['a red toy', 'a blue game'], seed=3)
    model.model.multi_modal_projector.linear_2.weight.data *= 20                        # `tiny` begins nearly blind
    model.save_pretrained(folder); processor.save_pretrained(folder)

FAMILIES = dict(qwen=qwen, idefics3=idefics3, smolvlm=lambda folder: idefics3(folder, smolvlm=True), llava=llava)

@pytest.fixture(scope='module')
def data(): return add_features(load_dataset('toys', source='planted', planted_users=40, planted_items=60), progress=False)

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('backbones')
    for k, (name, build) in enumerate(FAMILIES.items()): (root/name).mkdir(); torch.manual_seed(k); build(root/name)
    return root

@pytest.fixture(params=FAMILIES)
def backbone(request, folders): return load_backbone(str(folders/request.param))

def mixed(data):
    "Examples with no, one, several and six pictures, in this order, beside each other in one batch; their histories differ in length."
    there = [i for i in range(1, data.n_items + 1) if data.image(i) is not None]
    gone = [i for i in range(1, data.n_items + 1) if data.image(i) is None]
    rows = [(gone[:3], gone[3]), (gone[:5], there[0]), ([there[1], gone[0], there[2]], gone[1]), (there[3:8], there[8]), (gone[2:4], gone[0])]
    n = [sum(i in there for i in [*h, t]) for h, t in rows]
    assert n == [0, 1, 2, 6, 0]
    histories, targets = pl.Series([h for h, _ in rows], dtype=pl.List(pl.Int32)), pl.Series([t for _, t in rows], dtype=pl.Int32)
    return yes_no_examples(data, 'test', seed=0).head(5).with_columns(history=histories, target=targets)

def test_without_torchvision(): assert importlib.util.find_spec('torchvision') is None

def test_the_batch_does_not_matter(backbone, data):
    "A prompt gets the same answer alone as in a padded batch beside others, whatever number of pictures they have."
    some = mixed(data)
    together = score_yes_no(*backbone, data, some, batch_size=8, progress=False)
    for k in range(some.height):
        alone = score_yes_no(*backbone, data, some[k:k + 1], progress=False)
        assert abs(alone['log_odds'][0] - together['log_odds'][k]) < 1e-4 and alone['answer'][0] == together['answer'][k]
    reverse = score_yes_no(*backbone, data, some[::-1], batch_size=2, progress=False)
    assert (reverse['log_odds'].reverse() - together['log_odds']).abs().max() < 1e-4

@torch.no_grad()
def answer_log_probs(model, batch):
    "Summed log-probabilities of the answers, [rows]."
    mask = batch['completion_mask'][:, 1:]
    lp = model(**{k: v for k, v in batch.items() if k not in ('completion_mask', 'weight')}, use_cache=False).logits.log_softmax(-1)[:, :-1]
    return (lp.gather(2, batch['input_ids'][:, 1:, None])[..., 0]*mask).sum(1)

def test_the_batch_does_not_matter_to_pairs(backbone, data):
    "The same for the rows [chosen | rejected] that the preference stage trains on."
    model, processor = backbone
    rows, collate = mixed(data).to_dicts(), Collator(data, processor, 'pair')
    together = answer_log_probs(model, collate(rows)).chunk(2)
    for k, row in enumerate(rows):
        alone = answer_log_probs(model, collate([row]))
        assert (alone - torch.stack([t[k] for t in together])).abs().max() < 1e-4

def test_pictures_reach_the_model(backbone, data):
    "Another picture of the item in question changes the odds; the examples without it keep theirs."
    some = mixed(data); item = some['target'][1]
    before = score_yes_no(*backbone, data, some, progress=False)['log_odds']
    image = data.image
    data.image = lambda i: Image.new('RGB', (64, 64), (210, 20, 90)) if i == item else image(i)
    try: after = score_yes_no(*backbone, data, some, progress=False)['log_odds']
    finally: del data.image
    changed = (before - after).abs()
    assert changed[1] > 1e-3 and changed[0] == changed[2] == changed[3] == 0

def test_lora_is_in_the_language_model_only(backbone):
    from peft import get_peft_model
    policy = get_peft_model(backbone[0], lora_config())
    adapted = [n for n, m in policy.named_modules() if hasattr(m, 'lora_A') and len(m.lora_A)]
    assert len(adapted) == 2*7 and not any('vis' in n for n in adapted)           # two blocks, seven linear layers each
    assert all('lora_' in n for n, p in policy.named_parameters() if p.requires_grad)

@torch.no_grad()
def test_qwen_counts_positions_by_picture(folders, data):
    "The types of the tokens reach the model: without them the positions inside a picture are a text's, and the logits are others."
    model, processor = load_backbone(str(folders/'qwen'))
    x = Collator(data, processor, 'right')(mixed(data).to_dicts())
    types = x['mm_token_type_ids']
    assert torch.equal(types, (x['input_ids'] == processor.image_token_id).long()) and types.sum() == (0 + 1 + 2 + 6 + 0)*4
    a, b = (model(**v, use_cache=False).logits[3] for v in (x, {k: v for k, v in x.items() if k != 'mm_token_type_ids'}))
    assert (a - b).abs().max() > 1e-3

@pytest.mark.parametrize('name', ['Qwen2_5_VL', 'Idefics3', 'SmolVLM', 'Llava'])
def test_lora_finds_the_layers_at_full_size(name):
    "In the architectures with their default sizes, built without memory."
    import re, transformers
    from mmrec_wb.mllm.backbones import LORA_LAYERS
    config = getattr(transformers, f'{name}Config')()
    with torch.device('meta'): model = getattr(transformers, f'{name}ForConditionalGeneration')(config)
    hit = {n: m for n, m in model.named_modules() if re.fullmatch(LORA_LAYERS, n)}
    assert len(hit) == 7*config.get_text_config().num_hidden_layers >= 7*16
    assert all(isinstance(m, torch.nn.Linear) for m in hit.values()) and not any('vis' in n for n in hit)

def test_half_precision_is_kept_on_a_gpu_only(folders, tmp_path):
    model, processor = load_backbone(str(folders/'qwen')); model.bfloat16().save_pretrained(tmp_path); processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path/'config.json').read_text())['dtype'] == 'bfloat16'
    assert load_backbone(str(tmp_path))[0].dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)

def test_the_layout_of_published_checkpoints(folders, tmp_path, data):
    "Qwen2.5-VL as it was published: shards, weights under their first names, text settings at the top of config.json, the template in chat_template.json."
    from shutil import copytree
    copytree(folders/'qwen', tmp_path, dirs_exist_ok=True)
    old = lambda n: n.replace('model.visual.', 'visual.').replace('model.language_model.', 'model.')
    kept = {old(n): w for n, w in load_file(tmp_path/'model.safetensors').items()}; (tmp_path/'model.safetensors').unlink()
    shards = {f'model-0000{k + 1}-of-00002.safetensors': {n: w for n, w in kept.items() if n.startswith('visual.') == bool(k)} for k in (0, 1)}
    for f, part in shards.items(): save_file(part, tmp_path/f, metadata=dict(format='pt'))
    (tmp_path/'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map={n: f for f, part in shards.items() for n in part})))
    config = json.loads((tmp_path/'config.json').read_text()); text = config.pop('text_config')
    rope = text.pop('rope_parameters'); text.pop('model_type')
    older = dict(rope_theta=rope['rope_theta'], rope_scaling=dict(type='mrope', mrope_section=rope['mrope_section']), tie_word_embeddings=True)
    (tmp_path/'config.json').write_text(json.dumps(text | config | older))
    (tmp_path/'chat_template.json').write_text(json.dumps(dict(chat_template=(tmp_path/'chat_template.jinja').read_text())))
    (tmp_path/'chat_template.jinja').unlink()
    check_backbone(str(tmp_path))
    a, b = (score_yes_no(*load_backbone(str(f)), data, mixed(data), progress=False)['log_odds'] for f in (folders/'qwen', tmp_path))
    assert (a - b).abs().max() < 1e-6

LLAVA_15 = ("{% for message in messages %}{{ message['role'].upper() + ': '}}"
            "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
            "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
            "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")

def test_the_template_of_llava_15(folders, data):
    "It moves all pictures to the front, in their order, and marks no end of a turn: the answer ends with the tokenizer's end."
    model, processor = load_backbone(str(folders/'llava')); processor.chat_template = LLAVA_15
    x = Collator(data, processor, 'right')(mixed(data)[2:3].to_dicts())
    text = processor.tokenizer.decode(x['input_ids'][0])
    assert text.startswith('USER: ' + ('<image>'*4 + '\n')*2 + 'Items')
    assert processor.tokenizer.decode(x['input_ids'][0][x['labels'][0] >= 0]) in (' Yes</s>', ' No</s>')

@torch.no_grad()
def test_item_vectors_are_the_authors(backbone, data):
    "norm(norm(title) + norm(picture)), computed here from the model's parts."
    model, processor = backbone
    v, tower = backbone_vectors(model, processor, data), model.model
    unit = lambda x: x/x.norm()
    assert v.shape == (data.n_items + 1, 64 if model.config.model_type != 'llava' else 128)
    assert not v[0].any() and np.allclose(np.linalg.norm(v[1:], axis=1), 1, atol=1e-5)
    with_picture = next(i for i in range(1, data.n_items + 1) if data.image(i) is not None)
    without = next(i for i in range(1, data.n_items + 1) if data.image(i) is None)
    title = lambda i: unit(model.get_input_embeddings().weight[processor.tokenizer(data.catalogue['title'][i], add_special_tokens=False)['input_ids']].mean(0))
    x = processor.image_processor([data.image(with_picture)], return_tensors='pt')
    if 'image_grid_thw' in x: patches = tower.visual(x['pixel_values'], grid_thw=x['image_grid_thw']).pooler_output
    elif hasattr(tower, 'connector'):
        mask = torch.ones(x['pixel_values'].shape[1], 4, 4, dtype=torch.bool)
        patches = tower.connector(tower.vision_model(x['pixel_values'][0], patch_attention_mask=mask).last_hidden_state)
    else: patches = tower.multi_modal_projector(tower.vision_tower(x['pixel_values'], output_hidden_states=True).hidden_states[-1][:, 1:])
    assert np.allclose(v[without], title(without), atol=1e-5)
    assert np.allclose(v[with_picture], unit(title(with_picture) + unit(patches.reshape(-1, v.shape[1]).mean(0))), atol=1e-5)

def test_picture_tokens(folders, data):
    "How many tokens a picture takes, and how max_pixels bounds them."
    big = Image.new('RGB', (1500, 1000), (210, 20, 90))
    def tokens(name, **how):
        processor = load_backbone(str(folders/name), **how)[1]
        text = processor.apply_chat_template([dict(role='user', content=[dict(type='image'), dict(type='text', text='x')])], tokenize=False)
        return int((processor(text=[text], images=[[big]], return_tensors='pt')['input_ids'] == processor.image_token_id).sum())
    assert tokens('qwen') == 22*14 and tokens('qwen', max_pixels=28*28*6) == 3*2       # 616 x 392 px; 84 x 56
    assert tokens('smolvlm') == 4 and tokens('smolvlm', max_pixels=2048**2) == (4*3 + 1)*4     # one tile of 512 px; 2048 x 1365 px in tiles, and the whole
    assert tokens('idefics3') == (2*2 + 1)*4 and tokens('idefics3', max_pixels=32*32) == 4

def test_a_processor_survives_saving(folders, tmp_path, data):
    "The run record keeps it beside the model."
    from transformers import ProcessorMixin
    for name in FAMILIES:
        model, processor = load_backbone(str(folders/name))
        assert isinstance(processor, ProcessorMixin)                                   # TRL asks that of whatever sees pictures
        model.save_pretrained(tmp_path/name); processor.save_pretrained(tmp_path/name)
        again = load_backbone(str(tmp_path/name))
        a, b = (Collator(data, p, 'pair')(mixed(data)[:2].to_dicts()) for p in (processor, again[1]))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        assert (answer_log_probs(model, a) - answer_log_probs(again[0], b)).abs().max() < 1e-6

def test_smolvlm_prompts_are_transformers_own(folders):
    "Without its video half a SmolVLM prompt is expanded as SmolVLMProcessor would."
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string
    processor = load_backbone(str(folders/'smolvlm'))[1]
    for rows, cols in ((0, 0), (2, 3)):
        ours = processor.replace_image_token(dict(rows=[[rows]], cols=[[cols]]), 0)
        assert ours == get_image_prompt_string(rows, cols, 4, fake_token_around_image='<fake_token_around_image>',
                                               image_token='<image>', global_image_token='<global-img>')

@pytest.mark.parametrize('name', ['qwen', 'idefics3'])
def test_both_stages_train_it(folders, data, tmp_path, name):
    "SFT, then HaNoRec with hardness from the backbone: LoRA only, the folder untouched, and the recorded model answers as the evaluated one did."
    from mmrec_wb.training.hanorec import questions, settled, train_preference, train_sft
    folder = folders/name; before = (folder/'model.safetensors').read_bytes()
    few = add_features(load_dataset('toys', source='planted', planted_users=40, planted_items=60, max_users=30), progress=False)
    how = dict(out_dir=tmp_path, epochs=1, batch_size=8, backbone=str(folder), hardness_from='backbone', lr=1e-3, preference_lr=1e-3)
    sft = train_sft(few, **how); run = train_preference(few, sft, **how)
    assert (folder/'model.safetensors').read_bytes() == before and not list(tmp_path.glob('*/model'))
    test = questions(few, 'test', settled(how))
    answers = [score_yes_no(*load_backbone(str(folder)), few, test, progress=False)['log_odds']]
    for r in (sft, run):
        again = score_yes_no(*load_run(r.path).model(), few, test, progress=False)['log_odds']
        assert (again - r.frame('ranks')['log_odds']).abs().max() < 1e-4
        assert (again - answers[-1]).abs().max() > 1e-3; answers.append(again)
    kept = tmp_path/'copy'; shutil.copytree(folder, kept); how |= dict(backbone=str(kept)); one = train_sft(few, **how)
    assert train_sft(few, **how).path == one.path
    (kept/'generation_config.json').write_text('{}')                                          # the same name holds something else now
    assert train_sft(few, **how).path != one.path
    with pytest.raises(WorkbenchError, match='holds other files now'): load_run(one.path).model()

@pytest.mark.parametrize('name', ['qwen', 'idefics3'])
def test_gradient_checkpointing_changes_no_gradient(folders, data, name):
    "What a 3B model needs on one GPU."
    from peft import get_peft_model
    def gradients(checkpointing):
        torch.manual_seed(0); calls = []
        model, processor = load_backbone(str(folders/name))
        policy = get_peft_model(model, lora_config(dropout=0.)).train()
        for n, p in policy.named_parameters():
            if 'lora_B' in n: torch.nn.init.normal_(p, std=.05, generator=torch.Generator().manual_seed(len(n)))
        [m for n, m in policy.named_modules() if n.endswith('layers.1.mlp')][-1].register_forward_pre_hook(lambda *a: calls.append(1))
        if checkpointing: policy.enable_input_require_grads(); policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        policy(**Collator(data, processor, 'right')(mixed(data)[:3].to_dicts()), use_cache=False).loss.backward()
        return {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}, len(calls)
    (a, once), (b, twice) = gradients(False), gradients(True)
    assert (once, twice) == (1, 2)                                                     # forward, and again in backward
    assert max(g.abs().max() for g in a.values()) > 1e-4 and all((a[n] - b[n]).abs().max() < 1e-6 for n in a)

# ---- what cannot be loaded is said in one line, before any data is prepared
def spoil(folder, how):
    config = json.loads((folder/'config.json').read_text())
    if how == 'text-only model': (folder/'config.json').write_text(json.dumps(dict(model_type='llama')))
    if how == 'unknown family': (folder/'config.json').write_text(json.dumps(dict(model_type='brandnew_vl')))
    if how == 'config no JSON': (folder/'config.json').write_text('{')
    if how == 'no weights': (folder/'model.safetensors').unlink()
    if how == 'truncated weights': (folder/'model.safetensors').write_bytes((folder/'model.safetensors').read_bytes()[:-1000])
    if how == 'weights no safetensors': (folder/'model.safetensors').write_bytes(b'\x80\x04pickle')
    if how == 'a shard missing': (folder/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=dict(a='model-00001-of-00002.safetensors'))))
    if how == 'a shard elsewhere': (folder/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=dict(a='../model.safetensors'))))
    if how == 'code of its own': (folder/'config.json').write_text(json.dumps(config | dict(model_type='brandnew_vl', auto_map=dict(AutoConfig='code.Config'))))
    if how == 'no tokenizer': [f.unlink() for f in folder.glob('tokenizer*')]
    if how == 'no picture processor': (folder/'preprocessor_config.json').unlink()
    if how == 'no chat template': (folder/'chat_template.jinja').unlink()

SPOILT = {'text-only model': 'is a llama, not an image-text-to-text model', 'unknown family': 'config.json does not load',
    'config no JSON': 'config.json does not load', 'no weights': 'has no model.safetensors',
    'truncated weights': 'model.safetensors is damaged', 'weights no safetensors': 'model.safetensors is damaged',
    'a shard missing': 'has no model-00001-of-00002.safetensors',
    'a shard elsewhere': 'a file outside its folder', 'code of its own': 'config.json does not load',
    'no tokenizer': 'has no processor|has the tokenizer of another model', 'no picture processor': 'has no processor', 'no chat template': 'has no processor'}

@pytest.mark.parametrize('how', SPOILT)
@pytest.mark.parametrize('name', ['qwen', 'idefics3'])
def test_a_spoilt_folder_is_one_line(tmp_path, name, how):
    FAMILIES[name](tmp_path); check_backbone(str(tmp_path)); spoil(tmp_path, how)
    with pytest.raises(WorkbenchError, match=SPOILT[how]) as e: check_backbone(str(tmp_path))
    assert len(str(e.value)) < 500

def test_weights_that_are_not_all_there(folders, tmp_path):
    FAMILIES['qwen'](tmp_path)
    kept = load_file(tmp_path/'model.safetensors'); lost = next(n for n in kept if 'q_proj' in n); del kept[lost]
    save_file(kept, tmp_path/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(WorkbenchError, match='lacks 1 weights that its config.json asks for'): load_backbone(str(tmp_path))
