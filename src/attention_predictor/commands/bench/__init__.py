"""Time decoding, prefill or a kernel against alternatives, in one process.

examples:
  attnpred bench decode --context 8192 --budget 512
  attnpred bench policies --shape llama-3.1-8b --context 32768
  attnpred bench prefill --context 8192 --chunk 2048
  attnpred bench predictor --tokens 2048,32768
"""
