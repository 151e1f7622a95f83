from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ScoreRequest(_message.Message):
    __slots__ = ("page_product_id", "page_product_key", "ad_product_ids", "ad_product_keys", "context", "time_us", "request_id", "request_key")
    class ContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: ContextValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[ContextValue, _Mapping]] = ...) -> None: ...
    PAGE_PRODUCT_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_PRODUCT_KEY_FIELD_NUMBER: _ClassVar[int]
    AD_PRODUCT_IDS_FIELD_NUMBER: _ClassVar[int]
    AD_PRODUCT_KEYS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    TIME_US_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    page_product_id: int
    page_product_key: str
    ad_product_ids: _containers.RepeatedScalarFieldContainer[int]
    ad_product_keys: _containers.RepeatedScalarFieldContainer[str]
    context: _containers.MessageMap[str, ContextValue]
    time_us: int
    request_id: str
    request_key: str
    def __init__(self, page_product_id: _Optional[int] = ..., page_product_key: _Optional[str] = ..., ad_product_ids: _Optional[_Iterable[int]] = ..., ad_product_keys: _Optional[_Iterable[str]] = ..., context: _Optional[_Mapping[str, ContextValue]] = ..., time_us: _Optional[int] = ..., request_id: _Optional[str] = ..., request_key: _Optional[str] = ...) -> None: ...

class ContextValue(_message.Message):
    __slots__ = ("number", "text")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    number: float
    text: str
    def __init__(self, number: _Optional[float] = ..., text: _Optional[str] = ...) -> None: ...

class ScoreAnswer(_message.Message):
    __slots__ = ("bundle", "probabilities", "tiers", "page_fallback", "ad_fallbacks", "as_of_us", "request_id")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    PAGE_FALLBACK_FIELD_NUMBER: _ClassVar[int]
    AD_FALLBACKS_FIELD_NUMBER: _ClassVar[int]
    AS_OF_US_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    bundle: str
    probabilities: _containers.RepeatedScalarFieldContainer[float]
    tiers: _containers.RepeatedCompositeFieldContainer[TierAge]
    page_fallback: str
    ad_fallbacks: _containers.RepeatedCompositeFieldContainer[AdFallback]
    as_of_us: int
    request_id: str
    def __init__(self, bundle: _Optional[str] = ..., probabilities: _Optional[_Iterable[float]] = ..., tiers: _Optional[_Iterable[_Union[TierAge, _Mapping]]] = ..., page_fallback: _Optional[str] = ..., ad_fallbacks: _Optional[_Iterable[_Union[AdFallback, _Mapping]]] = ..., as_of_us: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class TierAge(_message.Message):
    __slots__ = ("tier", "age_seconds", "stale")
    TIER_FIELD_NUMBER: _ClassVar[int]
    AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    tier: str
    age_seconds: float
    stale: bool
    def __init__(self, tier: _Optional[str] = ..., age_seconds: _Optional[float] = ..., stale: _Optional[bool] = ...) -> None: ...

class AdFallback(_message.Message):
    __slots__ = ("index", "reason")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    index: int
    reason: str
    def __init__(self, index: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class PackedScoreRequest(_message.Message):
    __slots__ = ("page_product_id", "page_product_key", "ad_product_ids", "ad_product_keys", "context", "time_us", "request_id", "request_key")
    class ContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: ContextValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[ContextValue, _Mapping]] = ...) -> None: ...
    PAGE_PRODUCT_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_PRODUCT_KEY_FIELD_NUMBER: _ClassVar[int]
    AD_PRODUCT_IDS_FIELD_NUMBER: _ClassVar[int]
    AD_PRODUCT_KEYS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    TIME_US_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    page_product_id: int
    page_product_key: str
    ad_product_ids: _containers.RepeatedScalarFieldContainer[bytes]
    ad_product_keys: _containers.RepeatedScalarFieldContainer[str]
    context: _containers.MessageMap[str, ContextValue]
    time_us: int
    request_id: str
    request_key: str
    def __init__(self, page_product_id: _Optional[int] = ..., page_product_key: _Optional[str] = ..., ad_product_ids: _Optional[_Iterable[bytes]] = ..., ad_product_keys: _Optional[_Iterable[str]] = ..., context: _Optional[_Mapping[str, ContextValue]] = ..., time_us: _Optional[int] = ..., request_id: _Optional[str] = ..., request_key: _Optional[str] = ...) -> None: ...

class PackedScoreAnswer(_message.Message):
    __slots__ = ("bundle", "probabilities", "tiers", "page_fallback", "ad_fallbacks", "as_of_us", "request_id")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    PAGE_FALLBACK_FIELD_NUMBER: _ClassVar[int]
    AD_FALLBACKS_FIELD_NUMBER: _ClassVar[int]
    AS_OF_US_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    bundle: str
    probabilities: bytes
    tiers: _containers.RepeatedCompositeFieldContainer[TierAge]
    page_fallback: str
    ad_fallbacks: _containers.RepeatedCompositeFieldContainer[AdFallback]
    as_of_us: int
    request_id: str
    def __init__(self, bundle: _Optional[str] = ..., probabilities: _Optional[bytes] = ..., tiers: _Optional[_Iterable[_Union[TierAge, _Mapping]]] = ..., page_fallback: _Optional[str] = ..., ad_fallbacks: _Optional[_Iterable[_Union[AdFallback, _Mapping]]] = ..., as_of_us: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...
