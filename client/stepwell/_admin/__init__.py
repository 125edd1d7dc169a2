"""Operations on many sessions and on models."""
