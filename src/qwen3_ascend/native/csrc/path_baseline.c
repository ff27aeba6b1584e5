/* The path that runs everywhere: SSE2 on x86-64, NEON on aarch64. */
#define PATH_FLOATS 4 /* of a register */
#define PATH_TABLE path_table_baseline
#include "path.inc.h"
