// The header in C++: the functions have C's names, and are found.
#include <vmafx_bypass.h>

int main()
{
    vmafx_counts counts = {};
    vmafx_file *file = vmafx_open(nullptr, VMAFX_VERIFY_SAMPLE);
    bool right = file == nullptr && vmafx_stats(file, &counts, sizeof counts) == -1 &&
                 vmafx_abi_version() == VMAFX_ABI_VERSION &&
                 counts.mismatch != VMAFX_NO_MISMATCH;
    return right ? 0 : 1;
}
