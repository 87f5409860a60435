"""Steps of training and inference on one GPU: dense, pairs, pairs multiplied out, LoRA; eager and as CUDA graphs."""
