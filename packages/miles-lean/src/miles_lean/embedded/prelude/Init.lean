-- What a file without a header imports: the whole prelude.
prelude
import Init.Data
