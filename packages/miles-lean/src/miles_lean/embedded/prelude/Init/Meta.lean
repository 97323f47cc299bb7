/-
Lean's own data, as far as the elaborator asks for it: names, syntax trees, parser descriptions, macros. Constructor order is
Lean's, because its compiled code builds and reads these objects.
-/
prelude
import Init.Base

set_option linter.defProp false
set_option linter.unusedVariables false

@[inline] unsafe def unsafeCast {α : Sort u} {β : Sort v} (a : α) : β :=
  PULift.down.{u, v} (cast lcProof (PULift.up.{v, u} a))
structure ByteArray where
  mk ::
  data : Array UInt8
attribute [extern "lean_byte_array_mk"] ByteArray.mk
attribute [extern "lean_byte_array_data"] ByteArray.data

@[extern "lean_uint64_mix_hash"] opaque mixHash (u₁ u₂ : UInt64) : UInt64 := u₁
@[extern "lean_string_hash"] protected opaque String.hash (s : @& String) : UInt64 := UInt64.ofNatLT 0 (Nat.le_of_ble_eq_true (n := 1) (m := 18446744073709551616) rfl)
@[extern "lean_uint64_of_nat"] opaque UInt64.ofNat (n : @& Nat) : UInt64 := UInt64.ofNatLT 0 (Nat.le_of_ble_eq_true (n := 1) (m := 18446744073709551616) rfl)

namespace Lean

inductive Name where
  | anonymous : Name
  | str (pre : Name) (str : String)
  | num (pre : Name) (i : Nat)
with
  @[computed_field] hash : Name → UInt64
    | .anonymous => UInt64.ofNatLT 1723 (Nat.le_of_ble_eq_true (n := 1724) (m := 18446744073709551616) rfl)
    | .str p s => mixHash p.hash s.hash
    | .num p v => mixHash p.hash (dite (LT.lt v 18446744073709551616) (fun h => UInt64.ofNatLT v h) (fun _ => UInt64.ofNatLT 17 (Nat.le_of_ble_eq_true (n := 18) (m := 18446744073709551616) rfl)))

instance : Inhabited Name := Inhabited.mk Name.anonymous
abbrev Name.mkStr (p : Name) (s : String) : Name := Name.str p s
abbrev Name.mkNum (p : Name) (v : Nat) : Name := Name.num p v
abbrev Name.mkSimple (s : String) : Name := Name.mkStr Name.anonymous s
@[reducible] def Name.mkStr1 (s₁ : String) : Name := .str .anonymous s₁
@[reducible] def Name.mkStr2 (s₁ s₂ : String) : Name := .str (.str .anonymous s₁) s₂
@[reducible] def Name.mkStr3 (s₁ s₂ s₃ : String) : Name := .str (.str (.str .anonymous s₁) s₂) s₃
@[reducible] def Name.mkStr4 (s₁ s₂ s₃ s₄ : String) : Name := .str (.str (.str (.str .anonymous s₁) s₂) s₃) s₄
@[reducible] def Name.mkStr5 (s₁ s₂ s₃ s₄ s₅ : String) : Name := .str (.str (.str (.str (.str .anonymous s₁) s₂) s₃) s₄) s₅

end Lean

structure String.Pos.Raw where
  byteIdx : Nat
structure Substring.Raw where
  str : String
  startPos : String.Pos.Raw
  stopPos : String.Pos.Raw

namespace Lean

inductive SourceInfo where
  | original (leading : Substring.Raw) (pos : String.Pos.Raw) (trailing : Substring.Raw) (endPos : String.Pos.Raw)
  | synthetic (pos : String.Pos.Raw) (endPos : String.Pos.Raw) (canonical : Bool)
  | none
instance : Inhabited SourceInfo := Inhabited.mk SourceInfo.none
abbrev SyntaxNodeKind := Name
abbrev SyntaxNodeKinds := List SyntaxNodeKind
inductive Syntax.Preresolved where
  | namespace (ns : Name)
  | decl (n : Name) (fields : List String)
inductive Syntax where
  | missing : Syntax
  | node (info : SourceInfo) (kind : SyntaxNodeKind) (args : Array Syntax) : Syntax
  | atom (info : SourceInfo) (val : String) : Syntax
  | ident (info : SourceInfo) (rawVal : Substring.Raw) (val : Name) (preresolved : List Syntax.Preresolved) : Syntax
instance : Inhabited Syntax := Inhabited.mk Syntax.missing
structure TSyntax (ks : SyntaxNodeKinds) where
  raw : Syntax
instance {ks : SyntaxNodeKinds} : Inhabited (TSyntax ks) := Inhabited.mk (TSyntax.mk Syntax.missing)
structure Syntax.SepArray (sep : String) where
  elemsAndSeps : Array Syntax
structure Syntax.TSepArray (ks : SyntaxNodeKinds) (sep : String) where
  elemsAndSeps : Array Syntax
abbrev TSyntaxArray (ks : SyntaxNodeKinds) := Array (TSyntax ks)

inductive ParserDescr where
  | const (name : Name)
  | unary (name : Name) (p : ParserDescr)
  | binary (name : Name) (p₁ p₂ : ParserDescr)
  | node (kind : SyntaxNodeKind) (prec : Nat) (p : ParserDescr)
  | trailingNode (kind : SyntaxNodeKind) (prec lhsPrec : Nat) (p : ParserDescr)
  | symbol (val : String)
  | nonReservedSymbol (val : String) (includeIdent : Bool)
  | cat (catName : Name) (rbp : Nat)
  | parser (declName : Name)
  | nodeWithAntiquot (name : String) (kind : SyntaxNodeKind) (p : ParserDescr)
  | sepBy (p : ParserDescr) (sep : String) (psep : ParserDescr) (allowTrailingSep : Bool)
  | sepBy1 (p : ParserDescr) (sep : String) (psep : ParserDescr) (allowTrailingSep : Bool)
  | unicodeSymbol (val asciiVal : String) (preserveForPP : Bool)
instance : Inhabited ParserDescr := Inhabited.mk (ParserDescr.symbol "")
abbrev TrailingParserDescr := ParserDescr
namespace Parser
structure Category where
end Parser

abbrev MacroScope := Nat
end Lean

inductive EStateM.Result (ε σ α : Type u) : Type u where
  | ok (a : α) (s : σ) : EStateM.Result ε σ α
  | error (e : ε) (s : σ) : EStateM.Result ε σ α
instance {ε σ α : Type u} [Inhabited ε] [Inhabited σ] : Inhabited (EStateM.Result ε σ α) := Inhabited.mk (EStateM.Result.error default default)

namespace Lean
namespace Macro
structure Context where
  methods : Unit
  quotContext : Name
  currMacroScope : MacroScope
  currRecDepth : Nat
  maxRecDepth : Nat
  ref : Syntax
inductive Exception where
  | error (ref : Syntax) (msg : String) : Exception
  | unsupportedSyntax : Exception
instance : Inhabited Exception := Inhabited.mk Exception.unsupportedSyntax
structure State where
  macroScope : MacroScope
  traceMsgs : List (Prod Name String)
  expandedMacroDecls : List Name
instance : Inhabited State := Inhabited.mk (State.mk 0 List.nil List.nil)
end Macro
/-- A macro, written with its three arguments in sight: the interpreter counts them. -/
abbrev Macro := Syntax → Macro.Context → Macro.State → EStateM.Result Macro.Exception Macro.State Syntax
namespace PrettyPrinter
abbrev Unexpander := Syntax → Syntax → Unit → EStateM.Result Unit Unit Syntax
end PrettyPrinter
end Lean

/-! `sorry` and friends. -/
@[extern "lean_sorry", never_extract] axiom sorryAx (α : Sort u) (synthetic : Bool) : α
