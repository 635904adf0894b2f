// The distance transform of several layers, as select.cu calls it.
#ifndef CONTEXTRAST_EDT_CUH
#define CONTEXTRAST_EDT_CUH

#include "device.cuh"

namespace contextrast {

// The carry of one column at one band of 32 rows, as pack_carry packs it.
struct alignas(4) Carry {
  uint16_t above, below;
};

// One layer: a map of integers, its distances, and what the kernels leave for each other. The layers of one call share
// the type of their maps, the type of their distances and the number of images.
struct Plane {
  const void *map;
  int64_t stride_batch, stride_row, stride_column;
  int32_t height, width;
  int32_t none;       // of the map's values, outside of every class, as all negative ones are
  void *distance;     // (B, height, width)
  uint32_t *tickets;  // (B, strips of 32 columns): zero before
  uint32_t *sites;    // (B, bands of 32 rows, width): a word has the bits of the 32 rows of a band in one column
  uint32_t *wanted;   // likewise: the pixels whose distance is asked for
  Carry *carries;     // likewise

  void take_tickets(Scratch &scratch, int64_t batch);
  void take_words(Scratch &scratch, int64_t batch);
};

struct Planes {
  int32_t batch = 0, count = 0;
  Plane plane[CONTEXTRAST_MAX_LAYERS];
};

// Enqueues the kernels. `zeros`: distance_transform, else edge_distance. `squared`: int32 distances, else float.
cudaError_t enqueue_distances(const Planes &planes, int32_t type, bool zeros, bool squared, int device,
                              cudaStream_t stream);

// volume.cu: the functions of one volume, any type, sampling and indices. The arguments have been checked.
int64_t volume_scratch(const ContextrastVolume &volume, const ContextrastDistance &wanted, bool edges);
cudaError_t enqueue_volume(const ContextrastVolume &volume, const ContextrastDistance &wanted, bool edges, void *memory,
                           int device, cudaStream_t stream);

}  // namespace contextrast
#endif
