"""The objectives of Surgical Post-Training and its comparisons. Plain torch; independent of Megatron."""
