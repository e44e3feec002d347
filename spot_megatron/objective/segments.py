"""The three segments of a pair's scored tokens, numbered as `head_segment` of a pack and `segment_sums` use them."""

NUM_SEGMENTS = 3  # tokens of both responses, of the chosen one only, of the rejected one only
SHARED, CHOSEN, REJECTED = range(NUM_SEGMENTS)
