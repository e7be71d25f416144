// The emulator brings what the kernels need.
#pragma once
