"""Fine-tune the streams of a frozen chat model on conversations with TRL's SFTTrainer, and let it answer.

Needs TRL (`pip install trl`). The small model that the package carries becomes a chat model by a chat template; another
model brings its own.

    python examples/sft_chat_model.py --model Qwen/Qwen2.5-0.5B-Instruct --steps 200
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from parscale import wrap
from parscale.checkpoints import small_model_path

# What stands between the generation marks is trained on.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- message.role + ': ' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{ message.content + eos_token }}{% endgeneration %}
{%- else %}
{{- message.content }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{% endif %}"""

QUESTIONS = {
    "How do I open a file?": 'with open(path, encoding="utf-8") as file:',
    "How do I read a line?": "line = file.readline()",
    "How do I sort a list?": "result = sorted(values)",
    "How do I join paths?": "path = os.path.join(folder, name)",
    "How do I raise an error?": 'raise ValueError("no such name")',
    "How do I return nothing?": "return None",
    "How do I make a set?": "names = set()",
    "How do I loop over items?": "for key, value in table.items():",
}


def conversation(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(small_model_path()))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=20)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    model = wrap(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), num_streams=4, seed=0)
    model.freeze_backbone()
    model.print_trainable_parameters()

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=2,
            learning_rate=3e-2,
            max_length=128,
            assistant_only_loss=True,
            packing=True,  # conversations stand beside each other in sequences of max_length, and see only themselves
            bf16=torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        conversations = Dataset.from_list([conversation(*pair) for pair in QUESTIONS.items()])
        trainer = SFTTrainer(model, settings, train_dataset=conversations, processing_class=tokenizer)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    first, last = (sum(some) / len(some) for some in (losses[:3], losses[-3:]))
    print(f"loss on the answers {first:.2f}, at the end {last:.2f}")

    model.eval()
    print(f"{type(model).__name__} with {model.num_streams} streams answers:")
    for question in list(QUESTIONS)[:3]:
        messages = conversation(question, "")["messages"][:1]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        output = model.generate(**inputs.to(model.device), max_new_tokens=args.max_new_tokens, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"user: {question}\nassistant: {answer}")


if __name__ == "__main__":
    main()
