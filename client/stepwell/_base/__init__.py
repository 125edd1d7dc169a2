"""What every other part of the SDK uses: plain values and checks without I/O."""
