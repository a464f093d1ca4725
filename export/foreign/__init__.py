"""From a Q/DQ file of any tool to the one grid that both INT8 dialects spell: int8, zero point 0, a pair a tensor."""
