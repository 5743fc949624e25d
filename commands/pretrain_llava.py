"""Train a small LLaVA from scratch on chats about images: a CLIP vision tower, alone at first, then with a projector and a Llama.

    # the embedded LLaVA and its draft: see assets/shapes-llava/README.md
    python -m commands.pretrain_llava --dataset shapes --train_tokenizer_size 512 --output_dir runs/shapes-llava
    python -m commands.pretrain_llava --dataset shapes --init_from runs/shapes-llava/model_003000 --num_hidden_layers 2 --output_dir runs/shapes-draft

The result is a folder `model_<step>` that `LlavaForConditionalGeneration.from_pretrained` and `AutoProcessor.from_pretrained` load. Only answers are learned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from running.command_line import UserError, parse_args, run

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from data.images import IMAGE_TOKEN, ImageInputs
from data.registry import find_dataset, open_stream
from data.row_files import check_learnable
from data.shapes import QUESTION, names_all
from data_utils import EncodeOptions, PaddedBatches, Prefetched, encode_prompt, held_out_batches
from models.llava_target import load_chat_tokenizer, load_image_processor, load_llava_config
from models.target_model import DeviceArgs, read_weights
from running.run_files import in_one_step
from training.losses import learned_rows, learned_tokens
from training.pretraining import byte_level_bpe, damp_residual_writes, make_optimizer, pretrain, save_bf16
from training.tower_pretraining import pretrain_tower
from training.training_loop import Learner, TrainingArgs, TrainingTask

FIRST_TOKENS, PAD = ("<s>", "</s>", "<unk>"), "<pad>"
CHAT_TEMPLATE = (  # LLaVA's, with the BOS in it, and for chats without images, too
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}ASSISTANT: {% else %}USER: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PADDED_TO = 64  # the embedding has a multiple of so many rows, as LLaVA's
TOKENIZER_EXAMPLES = 5_000
VALIDATION_BATCHES, NAMED_SCENES, CAPTION_TOKENS = 8, 64, 96


@dataclass(kw_only=True)
class Args(TrainingArgs, DeviceArgs):
    """Train a small LLaVA."""

    dataset: str = field(default="shapes", metadata={"help": "data set of chats with images"})
    dataset_path: str | None = field(default=None, metadata={"help": "local files of the data set's form"})
    image_dir: str | None = field(default=None, metadata={"help": "folder of the images that local files name"})
    init_from: str | None = field(default=None, metadata={"help": "start from this LLaVA's vision tower, projector and first --num_hidden_layers blocks, whose shape it has"})
    tokenizer_path: str | None = field(default=None, metadata={"help": "a LLaVA whose tokenizer and image processor to take; --image_size must be that processor's"})
    train_tokenizer_size: int | None = field(default=None, metadata={"help": "train a byte-level BPE of this size on the data instead"})
    hidden_size: int = field(default=128, metadata={"help": "D of the Llama"})
    intermediate_size: int = field(default=256, metadata={"help": "width of its feed-forward layers"})
    num_hidden_layers: int = field(default=8, metadata={"help": "its blocks"})
    num_attention_heads: int = field(default=4, metadata={"help": "its attention heads"})
    num_key_value_heads: int = field(default=2, metadata={"help": "its key and value heads"})
    max_position_embeddings: int = field(default=1024, metadata={"help": "longest context"})
    image_size: int = field(default=56, metadata={"help": "pixels of an image's side"})
    patch_size: int = field(default=14, metadata={"help": "pixels of a patch's side"})
    vision_hidden_size: int = field(default=96, metadata={"help": "width of the vision tower"})
    vision_intermediate_size: int = field(default=192, metadata={"help": "width of its feed-forward layers"})
    vision_num_hidden_layers: int = field(default=4, metadata={"help": "its layers, of which the last is not used"})
    vision_num_attention_heads: int = field(default=4, metadata={"help": "its attention heads"})
    tower_steps: int = field(default=1000, metadata={"help": "steps that a new vision tower learns alone first, on drawn scenes (0: none, it learns with the rest)"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate of AdamW"})
    weight_decay: float = field(default=0.05, metadata={"help": "of AdamW, on matrices only"})

    def check(self) -> None:
        super().check()
        self.check_device()
        if self.learning_rate <= 0:
            raise UserError(f"--learning_rate {self.learning_rate}: must be positive")
        if [self.init_from, self.tokenizer_path, self.train_tokenizer_size].count(None) != 2:
            raise UserError("give one of --train_tokenizer_size 512, --tokenizer_path LLAVA and --init_from LLAVA")
        check_learnable(find_dataset(self.dataset))
        if self.image_dir is not None and not Path(self.image_dir).is_dir():
            raise UserError(f"--image_dir {self.image_dir}: no such folder; give the one with the images")
        if self.init_from is None:
            self._check_shape()
            self._check_tower()
        else:
            self._check_start(load_llava_config(self.init_from))

    def _check_start(self, config: LlavaConfig) -> None:
        """Raise UserError for more blocks than there are to start from."""
        if not 1 <= self.num_hidden_layers <= config.text_config.num_hidden_layers:
            raise UserError(f"--num_hidden_layers {self.num_hidden_layers}: {self.init_from} has {config.text_config.num_hidden_layers} blocks")

    def _check_shape(self) -> None:
        """Raise UserError for a model that cannot be made."""
        for whole, part in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads"), ("image_size", "patch_size"),
                            ("vision_hidden_size", "vision_num_attention_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise UserError(f"--{whole} {getattr(self, whole)} is no multiple of --{part} {getattr(self, part)}")
        if self.vision_num_hidden_layers < 2:
            raise UserError(f"--vision_num_hidden_layers {self.vision_num_hidden_layers}: must be at least 2, as the last one is not used")
        if self.max_length > self.max_position_embeddings:
            raise UserError(f"--max_length {self.max_length} exceeds --max_position_embeddings {self.max_position_embeddings}")

    def _check_tower(self) -> None:
        """Raise UserError for a lesson that a new tower cannot have."""
        if self.tower_steps < 0 or (self.tower_steps > 0 and find_dataset(self.dataset).name != "shapes"):
            raise UserError(f"--tower_steps {self.tower_steps}: must be 0 for --dataset {self.dataset}; only the scenes of shapes say what is in each quarter")
        if self.tower_steps > 0 and self.image_size // self.patch_size % 2:
            raise UserError(f"--image_size {self.image_size} makes {self.image_size // self.patch_size} patches of --patch_size in a row; for quarters it must be an even number")

    @property
    def pixels(self) -> tuple[int, int, int]:
        """The shape of an image's."""
        side = self.image_size if self.init_from is None else load_llava_config(self.init_from).vision_config.image_size
        return 3, side, side


def train_tokenizer(args: Args) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the training split's chats, whose last two tokens are `<image>` and `<pad>`, as LLaVA's."""
    stream = open_stream(args.dataset, "train", args.dataset_path, shuffle=False)
    chats = islice(stream.rest_of_epoch(), TOKENIZER_EXAMPLES)
    texts = (f"USER: {message['content']} ASSISTANT:" for chat in chats for message in chat["messages"])
    tokenizer = byte_level_bpe(texts, args.train_tokenizer_size - 2, FIRST_TOKENS)
    tokenizer.add_special_tokens([IMAGE_TOKEN, PAD])
    bos, eos, unk = FIRST_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token=unk, pad_token=PAD, model_max_length=args.max_position_embeddings,
        clean_up_tokenization_spaces=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_processor(args: Args, folder: Path) -> LlavaProcessor:
    """The run's tokenizer and image processor: another LLaVA's, or made once and kept in the run's folder."""
    kept = folder / "processor"
    source = args.init_from or args.tokenizer_path or (str(kept) if kept.exists() else None)
    if source is None:
        side = args.image_size
        tokenizer, images = train_tokenizer(args), CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    else:
        tokenizer, images = load_chat_tokenizer(source), load_image_processor(source, args.pixels)
    processor = LlavaProcessor(
        images, tokenizer, patch_size=args.patch_size, vision_feature_select_strategy="default", chat_template=tokenizer.chat_template,
        num_additional_image_tokens=1)
    if source is None:
        with in_one_step(kept) as partial:
            processor.save_pretrained(partial)
    return processor


def make_model(args: Args, tokenizer: PreTrainedTokenizerBase, attention: str) -> LlavaForConditionalGeneration:
    """The model to train, fp32: new, of the flags' shape, or the beginning of another."""
    torch.manual_seed(args.seed)
    if args.init_from is not None:
        config = load_llava_config(args.init_from)
        config.text_config.num_hidden_layers = args.num_hidden_layers
        return read_weights(
            LlavaForConditionalGeneration, args.init_from, all_blocks=False, config=config, dtype=torch.float32, attn_implementation=attention)
    vision = CLIPVisionConfig(
        hidden_size=args.vision_hidden_size, intermediate_size=args.vision_intermediate_size, num_hidden_layers=args.vision_num_hidden_layers,
        num_attention_heads=args.vision_num_attention_heads, image_size=args.image_size, patch_size=args.patch_size, projection_dim=args.vision_hidden_size)
    text = LlamaConfig(
        vocab_size=-(-(len(tokenizer) + 1) // PADDED_TO) * PADDED_TO, hidden_size=args.hidden_size, intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_hidden_layers, num_attention_heads=args.num_attention_heads, num_key_value_heads=args.num_key_value_heads,
        max_position_embeddings=args.max_position_embeddings, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    marker = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=marker, image_seq_length=(args.image_size // args.patch_size) ** 2, tie_word_embeddings=True)
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config)
    damp_residual_writes(model.model.language_model.layers)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return model


class Pretraining:
    """The callbacks of one run: loss, validation, captions and saving."""

    def __init__(self, args: Args, folder: Path, processor: LlavaProcessor) -> None:
        self.args, self.folder, self.processor, self.tokenizer = args, folder, processor, processor.tokenizer
        self.device, self.dtype, attention = args.resolve()
        self.model = make_model(args, self.tokenizer, attention).to(self.device)
        config, folder_of_images = self.model.config, None if args.image_dir is None else Path(args.image_dir)
        self.images = ImageInputs(config.image_token_id, config.image_seq_length, processor.image_processor, folder_of_images)
        self.options = EncodeOptions(self.tokenizer, "assistant", args.max_length, args.batch_size, self.images)
        self._prepare_tower()
        self.streams = [open_stream(args.dataset, "train", args.dataset_path, args.seed)]
        self.batches = Prefetched(PaddedBatches(self.streams[0], self.options))
        held_out = open_stream(args.dataset, "validation", args.dataset_path, args.seed)
        self.validation = held_out_batches(held_out, self.options, VALIDATION_BATCHES)
        self.scenes = list(islice((example for example in held_out.rest_of_epoch() if "scene" in example), NAMED_SCENES))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = make_optimizer(trained, args.learning_rate, args.weight_decay)
        self.learner = Learner("", folder, trained, optimizer, args.learning_rate, self.save)

    def _prepare_tower(self) -> None:
        """The vision tower as its own lesson leaves it, taught once and kept in the run's folder, or another LLaVA's; as in LLaVA it then stays as it is."""
        tower, kept = self.model.model.vision_tower, self.folder / "tower.safetensors"
        if self.args.init_from is not None:
            tower.requires_grad_(False)
        if self.args.init_from is not None or self.args.tower_steps == 0:
            return
        if not kept.exists():
            stream = open_stream(self.args.dataset, "train", None, self.args.seed + 1)
            right = pretrain_tower(tower, stream, self.images, self.model.config.vision_feature_layer, self.args.tower_steps)
            print(f"the vision tower tells {right:.1%} of the traits of a quarter", flush=True)
            with in_one_step(kept) as partial:
                save_file({name: tensor.contiguous().cpu() for name, tensor in tower.state_dict().items()}, partial)
        tower.load_state_dict(load_file(kept))
        tower.requires_grad_(False)

    def count(self, batch: dict) -> int:
        return batch["global_tokens"]

    def _batch_loss(self, batch: dict) -> torch.Tensor:
        """Cross-entropy of the learned tokens, summed, nats."""
        inputs = {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask", "pixel_values") if name in batch}
        mask = batch["loss_mask"].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            logits = self.model(**inputs, use_cache=False).logits
        return cross_entropy(learned_rows(logits, mask).float(), learned_tokens(inputs["input_ids"], mask), reduction="sum")

    def learn(self, batch: dict, scale: float) -> list[dict[str, torch.Tensor]]:
        loss = self._batch_loss(batch)
        (scale * loss).backward()
        return [{"loss": loss}]

    @torch.no_grad()
    def validate(self) -> None:
        """Token-mean loss on held-out chats, and, of drawn scenes, the share of captions that name all shapes and colours and no others."""
        self.model.eval()
        total = sum(float(self._batch_loss(batch)) for batch in self.validation)
        self.learner.validation = {"validation_loss": total / sum(int(batch["loss_mask"].sum()) for batch in self.validation)}
        if self.scenes:
            captions = self._captions()
            print(f"--- {captions[0]}")
            right = [names_all(text, example["scene"]) for text, example in zip(captions, self.scenes, strict=True)]
            self.learner.validation["validation_named"] = sum(right) / len(right)
        self.model.train()

    def _captions(self) -> list[str]:
        """What the model says of the held-out images, greedily."""
        ask = {"messages": [{"role": "user", "content": QUESTION}]}
        ids = self.images.with_placeholders(encode_prompt(self.tokenizer, ask, num_images=1))
        prompts = torch.tensor([ids] * len(self.scenes), device=self.device)
        pixels = torch.cat([self.images.pixels(example["images"]) for example in self.scenes]).to(self.device)
        out = self.model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), pixel_values=pixels, max_new_tokens=CAPTION_TOKENS, do_sample=False)
        return self.tokenizer.batch_decode(out[:, len(ids) :], skip_special_tokens=True)

    def save(self, step: int, losses: dict[str, float]) -> Path:
        """Write `model_<step>`."""
        return save_bf16(self.folder, step, self.model, self.processor)

    def task(self) -> TrainingTask:
        return TrainingTask([self.learner], self.batches, self.count, self.learn, self.validate, ("validation_loss", "validation_named"))

    def close(self) -> None:
        """End the thread that reads ahead."""
        self.batches.close()


def main() -> int:
    args = parse_args(Args)
    args.check()
    return pretrain(args, lambda args, folder: Pretraining(args, folder, make_processor(args, folder)))


if __name__ == "__main__":
    run(main)
