"""Who calls, and what each may have, as files of the operator say.

Callers are found by what their calls show: a token, a certificate or a JWT. It may touch those files and the rules of
`core`; who asks, and what becomes of the answer, is not its affair.
"""
