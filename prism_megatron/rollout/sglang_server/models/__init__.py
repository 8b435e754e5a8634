"""Models that replace SGLang's of the same names, by SGLANG_EXTERNAL_MODEL_PACKAGE."""
