"""Operations on attention maps [B, H, N, N], which are never all in memory."""
