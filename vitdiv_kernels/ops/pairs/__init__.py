"""Operations on pairs of vectors: cosines of all pairs, which are never all in memory."""
