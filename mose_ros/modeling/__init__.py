"""The MoSE network in PyTorch, on Hugging Face's Qwen2-VL."""
