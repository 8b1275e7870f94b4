// What tests call to steer the emulator.

#include "cuda_runtime.h"

// Draws the order of blocks and of threads from a seed; 0 restores the natural order.
extern "C" void dn_detr_emulator_shuffle(unsigned seed) {
  emulator::shuffled = seed != 0;
  emulator::random.seed(seed);
}
